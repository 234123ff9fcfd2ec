"""The benchmark cases of every op: `bench/kernel_cases/<op>.py` for each name in `dispatch.OPS`, and for attention.

To add an op, write such a module with one function:

    def cases(device: torch.device) -> list[KernelCase]:
        ...

It returns the op at the shapes of the paper's runs: the whole batch of a training step on CUDA, and on the meta device,
for predictions, which need no more than the shapes; on the CPU a batch of which the eager form takes milliseconds, and
two cases at most, because torch.compile takes seconds for each (the whole CPU run has 6 minutes). A second function of
this form, `nearly_empty`, returns it on a few numbers, for what a call costs the host (`bench/host_cost.py`). Nothing
else needs to know of the module. `KernelCase` describes its fields; `noise_inject.py` and `cosine_align.py` are the
models to follow. Try it with

    python -m bench kernels --ops <op> --quick

The harness does the rest. Per case it checks that every backend gives what the eager form gives, then times the eager
form, torch.compile of it, further yardsticks of the case, every backend that runs on the device, and a copy of as many
bytes: forward under `no_grad`, and forward with backward where the case says that there is one. What fails is reported
in its place and stops nothing else. Goals are in `bench/goals.py`.
"""

import importlib
import importlib.util

import torch

from bench.kernel_cases.case import KernelCase
from sendvae_fast.ops.dispatch import OPS

LIBRARY_OPS = ("attention",)
"""Ops that have no backends of our own: their public function is one form, named like the op."""


def available_ops() -> list[str]:
    """The ops that have a case module, in the order of `OPS`."""
    return [op for op in (*OPS, *LIBRARY_OPS) if importlib.util.find_spec(f"{__name__}.{op}") is not None]


def cases_of(op: str, device: torch.device) -> list[KernelCase]:
    """The op's cases on `device`."""
    return importlib.import_module(f"{__name__}.{op}").cases(device)


def nearly_empty_cases_of(op: str, device: torch.device) -> list[KernelCase]:
    """The op's cases of a few numbers on `device`; its work is then next to nothing beside what a call costs."""
    return importlib.import_module(f"{__name__}.{op}").nearly_empty(device)
