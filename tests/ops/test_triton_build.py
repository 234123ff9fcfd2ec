"""The Triton kernels build for real GPUs, which needs none: the interpreter that the other tests use builds nothing.

In a process without the interpreter every op runs its typical example on CPU tensors, with launches recorded instead of
made. Each kernel is then compiled as it was first launched, with those types, constants and options, for one GPU;
`make triton-build` compiles it for every GPU, and once for each other set of constants.
"""

import importlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from everything import EVERYTHING
from time_limits import HANG_S

pytestmark = pytest.mark.slow

CAPABILITIES = (90, 80, 100) if EVERYTHING else (90,)
# Local memory is spilled registers; the rest is arithmetic less exact than the reference's.
UNWANTED = ("ld.local", "st.local", "sqrt.approx", "lg2.approx", "div.full")
OPTIONS = ("num_warps", "num_stages", "num_ctas")


def record_launches() -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """By name each kernel and the arguments of its launches, by the example and then by the raw calls of its op."""
    import torch
    from op_cases import ALL
    from triton.runtime.jit import JITFunction

    from sendvae_fast.ops import dispatch, use_backend
    from sendvae_fast.ops.registration import op_of

    launches, kernels = {}, {}
    ops = [tests for tests in ALL if "triton" in dispatch.OPS[tests.op]]
    for tests in ops:
        module = importlib.import_module(f"sendvae_fast.ops.triton.{tests.op}")
        functions = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
        # The others are functions that kernels call.
        kernels |= {f"{tests.op} {name}": value for name, value in functions.items() if name.endswith("_kernel")}
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels are defined: this only lets CPU tensors through
    names = {id(kernel): name for name, kernel in kernels.items()}

    def record(kernel, *arguments, grid, warmup, **keywords):
        bound = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        launches.setdefault(names[id(kernel)], (kernel, []))[1].append(bound)

    JITFunction.run = record
    for tests in ops:
        dtype = torch.bfloat16 if torch.bfloat16 in tests.dtypes else tests.dtypes[0]
        with use_backend("triton"):
            tests.example(0, dtype, "cpu").run()
            for name, arguments in tests.raw_calls("triton", "cpu"):
                op_of(name, "triton")(*arguments)
    assert launches.keys() == kernels.keys(), f"never launched: {kernels.keys() - launches.keys()}"
    return launches


def build_all() -> dict[str, dict[str, int]]:
    """Compile every kernel for every GPU; counts of instructions that matter, by kernel, constants and capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    launched = record_launches()
    del os.environ["TRITON_INTERPRET"]
    counts = {}
    for name, (kernel, launches) in launched.items():
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        seen = []
        for arguments in launches if EVERYTHING else launches[:1]:
            options = {key: arguments[key] for key in OPTIONS if key in arguments}
            constants = {key: arguments[key] for key in kernel.arg_names if key in constant or arguments[key] is None}
            if (options, constants) in seen:
                continue
            seen.append((options, constants))
            types = {key: mangle_type(arguments[key]) for key in kernel.arg_names if key not in constants}
            signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
            places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
            for capability in CAPABILITIES if len(seen) == 1 else CAPABILITIES[:1]:
                source = ASTSource(kernel, signature, places)
                built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                counts[f"{name} {constants} {capability}"] = {
                    "cubin": len(built.asm["cubin"]), **{word: built.asm["ptx"].count(word) for word in UNWANTED},
                }  # fmt: skip
    return counts


@pytest.mark.filterwarnings("ignore")
def test_kernels_build_without_spills_or_rough_arithmetic():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    counts = json.loads(result.stdout)
    assert len(counts) > len(CAPABILITIES)
    for name, count in counts.items():
        assert count.pop("cubin") > 0
        assert not any(count.values()), (name, count)


if __name__ == "__main__":
    print(json.dumps(build_all()))
