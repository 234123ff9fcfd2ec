"""The launches of an op's benchmark cases, recorded without a GPU by tests/cuda_on_cpu."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from bench.machine import ROOT
from bench.prediction.cubin import Kernel
from bench.prediction.warp import Launch
from sendvae_fast.errors import UserError
from sendvae_fast.ops import library as ops_library

RECORDER = ROOT / "tests" / "cuda_on_cpu" / "record.py"
ALSO_CALLED = {"adamw_ema": ("global_norm",)}
"""Further ops with kernels of their own that an op's cases call."""


@dataclass(frozen=True)
class Recorded:
    """One case and pass. others: PyTorch's own kernels, by name and bytes. tensors: address and bytes of each."""

    op: str
    case: str
    pass_name: str
    least_bytes: int
    launches: list[dict[str, Any]]
    tensors: list[tuple[int, int]]
    others: list[tuple[str, int]]


def recorded(op: str) -> list[Recorded]:
    """What the op's cases launch.

    Raises:
        UserError: this machine cannot build or run the recorder.
    """
    job = {"op": op, "libraries": [op, *ALSO_CALLED.get(op, ())]}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths}
    script = "from cuda_on_cpu import build; print(build.reason_not_to_build() or build.schema_library())"
    schemas = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    answer = (schemas.stdout or schemas.stderr).strip().rpartition("\n")[2]
    if not answer.endswith(".so"):
        raise UserError(f"the CUDA kernels cannot be built for this CPU: {answer}")
    result = subprocess.run(
        [sys.executable, str(RECORDER)], input=json.dumps(job) + "\n",
        env={**environment, ops_library.ENVIRONMENT_VARIABLE: answer}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise UserError(f"{op}: its launches cannot be recorded: {result.stderr.strip().rpartition(chr(10))[2]}")
    return [
        Recorded(
            case["op"], case["case"], case["pass"], case["bytes"], case["launches"],
            [(address, size) for address, size in case["tensors"]], [(name, size) for name, size in case["others"]],
        )
        for case in json.loads(result.stdout.splitlines()[-1])
    ]  # fmt: skip


def launch_of(record: dict[str, Any], kernel: Kernel) -> Launch:
    """The launch as the kernel's machine code sees it: arguments where its parameters lie.

    Raises:
        UserError: arguments and parameters do not fit, which a host conversion of floating-point numbers would make.
    """
    size = max((offset + bytes_ for offset, bytes_ in kernel.parameters), default=0)
    memory = bytearray(size)
    arguments = record["arguments"]
    if len(arguments) != len(kernel.parameters):
        raise UserError(f"{kernel.name}: launched with {len(arguments)} arguments, has {len(kernel.parameters)}")
    for (text, is_floating), (offset, bytes_) in zip(arguments, kernel.parameters, strict=True):
        value = bytes.fromhex(text)
        if len(value) != bytes_:
            if is_floating or max(len(value), bytes_) > 8:
                raise UserError(f"{kernel.name}: an argument of {len(value)} bytes for a parameter of {bytes_}")
            value = int.from_bytes(value, "little", signed=True).to_bytes(8, "little", signed=True)[:bytes_]
        memory[offset : offset + bytes_] = value
    grid, block = tuple(record["grid"]), tuple(record["block"])
    return Launch(grid, block, bytes(memory))
