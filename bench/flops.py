"""The arithmetic of a step, and the machine's speed of matrix products."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.timing import Timing, time_interleaved

GEMM_SIZE = {"cuda": 8192, "cpu": 1536}


class FlopCounter(TorchDispatchMode):
    """Adds up PyTorch's own formulas, as its FlopCounterMode does; that one's hooks on modules forbid autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations (a multiply-add is two) of convolutions, matrix products and attention in a call."""
    with FlopCounter() as counter:
        call()
    return counter.total


def gemm_flops_per_s(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The speed of a large square matrix product: the most that this machine reaches now."""
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing: Timing = time_interleaved(device, {"gemm": lambda _: a @ b}, 1, seconds, sample_s=0.02)["gemm"]
    return 2 * size**3 / (timing.median_us * 1e-6)
