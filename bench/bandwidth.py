"""The machine's speed of copying memory."""

import torch

from bench.kernel_rows import copy_call
from bench.timing import time_interleaved

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}  # far more than any cache


def copy_bytes_per_s(device: torch.device, seconds: float) -> float:
    """Bytes read and written in a second by a large copy: the most that this machine reaches now."""
    num_bytes = COPY_BYTES[device.type]
    call = copy_call(num_bytes, 1, device)
    timing = time_interleaved(device, {"copy": call}, 1, seconds, sample_s=0.02)["copy"]
    return num_bytes / (timing.median_us * 1e-6)
