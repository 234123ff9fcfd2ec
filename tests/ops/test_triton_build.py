"""The Triton kernels build for real GPUs, which needs none: the interpreter that the other tests use builds nothing."""

import json
import os
import subprocess
import sys

import pytest

CAPABILITIES = (80, 90, 100)
POINTER_TYPES = {
    "key_ptr": "*i64", "sample_ids_ptr": "*i64",
    "latent_mean_ptr": "*fp32", "latent_std_ptr": "*fp32", "given_t_ptr": "*fp32", "t_ptr": "*fp32",
    "distance_ptr": "*fp32", "stats_ptr": "*fp32", "grad_ptr": "*fp32",
}  # fmt: skip
CONSTANTS = {
    ("noise_inject", "_forward_kernel"): dict(HAS_T=False, SPREAD_IS_STD=False, PATCH=2, NUM_BLOCKS=256),
    ("noise_inject", "_backward_kernel"): dict(SPREAD_IS_STD=False, PATCH=2, NUM_BLOCKS=256),
    ("cosine_align", "_forward_kernel"): dict(HAS_MARGIN=True, NUM_ROWS=8, NUM_COLUMNS=256),
    ("cosine_align", "_backward_kernel"): dict(HAS_MARGIN=True, NEED_TARGET=True, NUM_ROWS=8, NUM_COLUMNS=256),
}


def build_all() -> dict[str, dict[str, int]]:
    """Compile every kernel for every GPU; counts of instructions that matter, by "op kernel capability"."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    counts = {}
    for (op, name), constants in CONSTANTS.items():
        kernel = getattr(importlib.import_module(f"sendvae_fast.ops.triton.{op}"), name)
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument.endswith("_ptr"):
                signature[argument] = POINTER_TYPES.get(argument, "*bf16")
            else:
                signature[argument] = "fp32" if argument in ("eps", "offset") else "i32"
        for capability in CAPABILITIES:
            source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            ptx = built.asm["ptx"]
            counts[f"{op} {name} {capability}"] = {
                "cubin": len(built.asm["cubin"]),
                **{word: ptx.count(word) for word in ("ld.local", "st.local", "sqrt.approx", "lg2.approx", "div.full")},
            }
    return counts


@pytest.mark.filterwarnings("ignore")
def test_kernels_build_without_spills_or_rough_arithmetic():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    counts = json.loads(result.stdout)
    assert len(counts) == len(CONSTANTS) * len(CAPABILITIES)
    for name, count in counts.items():
        assert count.pop("cubin") > 0
        assert not any(count.values()), (name, count)


if __name__ == "__main__":
    print(json.dumps(build_all()))
