"""The process group: this process's rank and device, and the few collectives that the engine's callers need."""

import atexit
import gc
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Imported before any group is made: its default arguments are the world group at the time of import. A later import (by
# DDP or torch.compile) would keep the group and its threads alive into interpreter shutdown, which then may abort.
import torch.distributed.nn.functional

from sendvae_fast.errors import UserError


@dataclass(frozen=True)
class Distributed:
    """The place of this process in its group; by default the only rank, on the CPU.

    Whoever starts a job makes one with `init_distributed` and passes it on. Every method but `close` is a collective:
    all ranks must call it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    store: dist.Store | None = field(default=None, compare=False, repr=False)
    """Where ranks leave notes for each other without waiting; None for one rank, or a group that was made elsewhere."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files that exist once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank, on the host (a GPU's queued work is not waited for)."""
        self.all_reduce_sum(torch.zeros(1))

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Give every rank the value that rank `source` passed (picklable; from our own processes only)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value on every rank, in rank order (picklable; from our own processes only)."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite the tensor on every rank by that of rank `source`, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place. A CPU tensor travels by gloo and costs no GPU synchronisation."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a floating tensor, in place."""
        return self.all_reduce_sum(tensor).div_(self.world_size)

    def close(self) -> None:
        """Destroy the process group; call it last, when no engine is in use any more. Exit does it otherwise."""
        _leave()


def init_distributed(device: str | None = None, timeout_s: float = 1800.0) -> Distributed:
    """Join the process group: torchrun's when its environment is set, else a group of one that needs no port.

    Safe to call again: the existing group is kept. A group made here is left when the process exits. `device` is "cpu"
    or "cuda" (default: the existing group's, else CUDA where there is one); with CUDA each local rank takes its own
    GPU, and cuDNN measures which of its algorithms is the fastest for a convolution, unless PyTorch is told to be
    deterministic. CPU tensors travel by gloo, CUDA tensors by NCCL.

    Raises:
        UserError: CUDA was asked for and there is none, or there are more local ranks than GPUs.
    """
    if device is not None:
        kind = device
    elif dist.is_initialized():
        kind = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    else:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device cuda was asked for and PyTorch sees no GPU: use device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own (this machine has {torch.cuda.device_count()}): "
                "start torchrun with fewer --nproc_per_node"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
        # Measured at the first call with each shape; a job has few shapes.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    else:
        place = torch.device("cpu")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        _join(backend, timedelta(seconds=timeout_s))
        atexit.register(_leave)
    return Distributed(
        rank=dist.get_rank(), world_size=dist.get_world_size(), local_rank=local_rank, device=place, store=_stores[-1]
    )


_stores: list[dist.Store | None] = [None]
"""Last the store of the process group that was made here."""


def _join(backend: str, timeout: timedelta) -> None:
    if not ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    except ValueError as error:  # a variable is missing, or no number
        raise UserError(
            f"the environment says RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']}, but not how "
            f"the ranks meet ({error}): start them with torchrun, or unset RANK for a single process"
        ) from error
    dist.init_process_group(
        backend, timeout=timeout, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size
    )
    _stores.append(dist.PrefixStore("notes", store))


def _leave() -> None:
    """Destroy the process group, so that none of its threads sees the interpreter shut down, which aborts the process.

    An engine in a reference cycle keeps the group's threads alive beyond its destruction: cycles are freed first.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    del _stores[1:]
