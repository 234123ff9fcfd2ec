"""The speed of an all-reduce over the ranks of a job: `sendvae doctor --network`."""

from __future__ import annotations

import time

import torch

from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.errors import UserError

SIZES = (2**10, 2**16, 2**20, 2**24, 2**26)
"""Bytes of fp32 that are summed."""
BUDGET_S = 2.0
"""Seconds at most for a size, after the first two calls."""
MAX_CALLS = 50


def measure_network() -> int:
    """Print the table on rank 0. Collective; the exit code is 0.

    Raises:
        UserError: there is one rank alone.
    """
    ranks = init_distributed()
    if ranks.world_size == 1:
        raise UserError(
            "--network needs several ranks: torchrun --nproc-per-node 2 -m sendvae_fast doctor --network, or srun"
        )
    backend = "NCCL" if ranks.device.type == "cuda" else "gloo"
    if ranks.is_main:
        print(f"all-reduce of fp32 over {ranks.world_size} ranks by {backend}")
        print(f"{'bytes':>12}{'ms':>12}{'GB/s':>10}{'bus GB/s':>10}")
    for size in SIZES:
        seconds = all_reduce_seconds(ranks, size)
        if ranks.is_main:
            print(
                "{:>12,}{:>12.3f}{:>10.3f}{:>10.3f}".format(
                    size, 1e3 * seconds, *speeds(size, seconds, ranks.world_size)
                )
            )
    if ranks.is_main:
        print("GB/s: bytes over time; bus: what each rank sends in a ring, to compare with the network's own speed")
    ranks.close()
    return 0


def speeds(size: int, seconds: float, world_size: int) -> tuple[float, float]:
    """GB/s of the sum itself, and of what a rank sends in a ring: 2 (n - 1) / n times it (nccl-tests' busbw)."""
    own = size / seconds / 1e9
    return own, own * 2 * (world_size - 1) / world_size


def all_reduce_seconds(ranks: Distributed, size: int) -> float:
    """The median time of an all-reduce, over ranks the longest. Collective."""
    tensor = torch.ones(size // 4, device=ranks.device)
    began_s = time.monotonic()
    for _ in range(2):
        _timed(ranks, tensor)
    each_s = ranks.all_reduce_mean(torch.tensor((time.monotonic() - began_s) / 2, dtype=torch.float64)).item()
    calls = max(3, min(MAX_CALLS, int(BUDGET_S / max(each_s, 1e-9))))
    times = sorted(_timed(ranks, tensor) for _ in range(calls))
    return max(ranks.gather_objects(times[len(times) // 2]))


def _timed(ranks: Distributed, tensor: torch.Tensor) -> float:
    tensor.fill_(1.0)
    ranks.barrier()
    began_s = time.monotonic()
    ranks.all_reduce_sum(tensor)
    total = tensor[0].item()  # waits for the device
    seconds = time.monotonic() - began_s
    if total != ranks.world_size:
        raise UserError(f"an all-reduce of ones over {ranks.world_size} ranks gave {total}: look after the network")
    return seconds
