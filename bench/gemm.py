"""The machine's speed of matrix products."""

import torch

from bench.timing import Timing, time_interleaved

GEMM_SIZE = {"cuda": 8192, "cpu": 1536}


def gemm_flops_per_s(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The speed of a large square matrix product: the most that this machine reaches now."""
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing: Timing = time_interleaved(device, {"gemm": lambda _: a @ b}, 1, seconds, sample_s=0.02)["gemm"]
    return 2 * size**3 / (timing.median_us * 1e-6)
