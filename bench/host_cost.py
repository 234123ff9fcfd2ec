"""What a call of an op costs the host: CPU time on tensors of a few numbers, beside plain PyTorch's own.

On such tensors the arithmetic is next to nothing, and what is left is Python, the dispatcher, autograd and the memory
of the outputs. On a GPU the launches come on top; the Python part is the same on every device.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from bench.kernel_cases import nearly_empty_cases_of
from bench.kernel_cases.case import KernelCase, Work
from bench.kernel_rows import EAGER, FORWARD, WITH_BACKWARD, one_line, outputs_of
from bench.timing import rotations
from sendvae_fast.ops import chosen_backend

RECORDED = "forward, recorded for a backward pass"
ROUNDS, QUICK_ROUNDS = 60, 5
SAMPLE_S = 2e-3


def host_rows(op: str, device: torch.device, rounds: int = ROUNDS) -> Iterator[dict[str, Any]]:
    """A row per case and pass: CPU time per call of every form, in microseconds, without a forced backend."""
    for case in nearly_empty_cases_of(op, device):
        tensors = case.inputs(0)
        has_gradient = any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)
        for name in (FORWARD, RECORDED, WITH_BACKWARD) if has_gradient else (FORWARD,):
            row: dict[str, Any] = {"op": op, "case": case.name, "pass": name, "chosen": chosen_backend(op, device)}
            try:
                row["forms"] = host_times(forms_of(case, row["chosen"]), tensors, name, device, rounds)
            except Exception as error:
                row["error"] = one_line(error)
            yield row


def forms_of(case: KernelCase, chosen: str) -> dict[str, Work]:
    """Plain PyTorch, further yardsticks, and the op as it runs by itself, under the name of its backend."""
    return {EAGER: case.eager, **case.yardsticks, chosen: case.fused}


def host_times(
    forms: dict[str, Work], tensors: tuple[Any, ...], name: str, device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """The least and the median CPU time of a call over `rounds` samples of each form, taken in turn."""
    calls = {form: call_of(work, tensors, name) for form, work in forms.items()}
    repeats = {}
    for form, call in calls.items():
        sample_us(call, 20, device)
        repeats[form] = max(1, int(1e6 * SAMPLE_S / sample_us(call, 20, device)))
    samples: dict[str, list[float]] = {form: [] for form in calls}
    collecting = gc.isenabled()
    gc.disable()  # its passes fall on whichever form is running
    try:
        for order in islice(rotations(list(calls)), rounds):
            for form in order:
                samples[form].append(sample_us(calls[form], repeats[form], device))
    finally:
        if collecting:
            gc.enable()
    return {
        form: {"min_us": round(min(times), 2), "median_us": round(statistics.median(times), 2)}
        for form, times in samples.items()
    }


def call_of(work: Work, tensors: tuple[Any, ...], name: str) -> Callable[[], object]:
    """One call of a pass."""
    if name != WITH_BACKWARD:
        grad_mode = torch.no_grad if name == FORWARD else nullcontext

        def forward() -> None:
            with grad_mode():
                work(*tensors)

        return forward
    leaves = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]
    upstream = [torch.ones_like(x) for x in outputs_of(work, tensors) if x.requires_grad]

    def both() -> None:
        roots = [x for x in outputs_of(work, tensors) if x.requires_grad]
        torch.autograd.grad(roots, leaves, upstream)

    return both


def sample_us(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Microseconds of the process's CPU time per call: what else the machine does hardly counts."""
    start_ns = time.process_time_ns()
    for _ in range(repeats):
        call()
    end_ns = time.process_time_ns()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (end_ns - start_ns) / repeats / 1e3
