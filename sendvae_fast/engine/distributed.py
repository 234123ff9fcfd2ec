"""The process group: this process's rank and device, and the few collectives that the engine's callers need."""

import atexit
import dataclasses
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported before any group is made: its default arguments are the world group at the time of import. A later import (by
# DDP or torch.compile) would keep the group and its threads alive into interpreter shutdown, which then may abort.
import torch.distributed.nn.functional

from sendvae_fast.engine import flight_record
from sendvae_fast.engine.agreement import difference, facts_of_rank
from sendvae_fast.engine.launch import Place, adopt_slurm, read_place
from sendvae_fast.engine.rendezvous import RENDEZVOUS_S, meet
from sendvae_fast.errors import UserError

TIMEOUT_S = 1800.0
"""Seconds after which a collective fails, where nothing else is said."""
LAST_WORDS, LAST_WORDS_S = "last words", 3.0
"""Key of the message that rank 0 ends with, and how long the others wait for it before they say their own."""


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
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    """The group of its collectives; None for that of the whole process."""

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
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value on every rank, in rank order (picklable; from our own processes only)."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite the tensor on every rank by that of rank `source`, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=source, group=self.group)
        return tensor

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place. A CPU tensor travels by gloo and costs no GPU synchronisation."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce_mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a floating tensor, in place."""
        return self.all_reduce_sum(tensor).div_(self.world_size)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Context for what each rank opens by itself, such as its node's data: where one fails, all raise.

        Collective at its end, so that nobody waits for a rank that is gone; nothing in it may be collective.

        Raises:
            UserError: another rank failed; the message is its own, with the rank and its host before it.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        said = None if failure is None else f"rank {self.rank} on {socket.gethostname()}: {failure}"
        failures = [words for words in self.gather_objects(said) if words is not None]
        if failure is not None:
            raise failure
        if failures:
            raise UserError(failures[0])

    @contextmanager
    def beside(self, timeout_s: float = TIMEOUT_S) -> Iterator["Distributed"]:
        """The same ranks with a gloo group of their own, for one thread beside the one that trains. Collective.

        Its collectives fail after `timeout_s` seconds.

        Ranks match the collectives of a group by their order alone. Two threads of a rank that share a group begin
        theirs in an order that differs from rank to rank, so that one rank's gradients would meet another's note that
        a file is written. A group that one thread uses alone has one order. CPU tensors and objects only.
        """
        if self.world_size == 1:
            yield self
            return
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        yield dataclasses.replace(self, device=torch.device("cpu"), group=group)
        dist.destroy_process_group(group)  # after an error the thread may be in it still: exit destroys all groups

    def close(self) -> None:
        """Destroy the process group; call it last, when no engine is in use any more. Exit does it otherwise."""
        _leave()


def init_distributed(
    device: str | None = None,
    timeout_s: float = TIMEOUT_S,
    rendezvous_s: float = RENDEZVOUS_S,
    *,
    cuda_graph: bool = False,
    records: Path | str | None = None,
) -> Distributed:
    """Join the process group of torchrun, DeepSpeed's launcher or srun, else a group of one that needs no port.

    Safe to call again: the existing group is kept. A group made here is left when the process exits. With CUDA each
    local rank takes its own GPU, and cuDNN measures which of its algorithms is the fastest for a convolution, unless
    PyTorch is told to be deterministic. CPU tensors travel by gloo, CUDA tensors by NCCL.

    Args:
        device: "cpu" or "cuda"; by default the existing group's, else CUDA where there is one.
        timeout_s: seconds after which a collective fails.
        rendezvous_s: seconds in which all ranks must have come.
        cuda_graph: whether NCCL's work will be recorded. As PyTorch's notes on DDP in CUDA graphs ask, NCCL's own
            thread then does not end what fails or hangs; `engine.watchdog` does.
        records: the folder of the run, for NCCL's record of its last collectives: see `engine.flight_record`.

    Raises:
        UserError: CUDA was asked for and there is none, there are more local ranks than GPUs, the launcher's variables
            contradict each other, the ranks do not meet, or they differ in their versions.
    """
    if device is not None:
        kind = device
    elif dist.is_initialized():
        kind = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    else:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    adopt_slurm()
    place = read_place()
    own = _own_gpu(place) if kind == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
        # Measured at the first call with each shape; a job has few shapes.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    is_new = not dist.is_initialized()
    if is_new:
        if cuda_graph:
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # read when the group is made
        if records is not None:
            flight_record.record_into(Path(records))
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        _join(backend, place, timedelta(seconds=timeout_s), rendezvous_s)
        atexit.register(_leave)
    ranks = Distributed(dist.get_rank(), dist.get_world_size(), place.local_rank, own, _stores[-1])
    if is_new and ranks.world_size > 1:
        problem = difference(ranks.gather_objects(facts_of_rank(own)))
        if problem is not None:
            raise UserError(problem)
    return ranks


def _own_gpu(place: Place) -> torch.device:
    """The GPU of this rank: the one of its local rank, or the only one that a batch system lets the process see."""
    num_gpus = torch.cuda.device_count()
    if not torch.cuda.is_available():
        raise UserError("device cuda was asked for and PyTorch sees no GPU: use device cpu")
    if place.launcher == "srun" and num_gpus == 1:
        return torch.device("cuda", 0)  # srun --gpus-per-task=1; ranks that share a GPU are found out when they meet
    if place.local_rank >= num_gpus:
        raise UserError(
            f"local rank {place.local_rank} has no GPU of its own (this machine has {num_gpus}): start fewer ranks a "
            "node (torchrun --nproc-per-node, deepspeed --num_gpus, srun --ntasks-per-node)"
        )
    return torch.device("cuda", place.local_rank)


_stores: list[dist.Store | None] = [None]
"""Last the store of the process group that was made here."""


def _join(backend: str, place: Place, timeout: timedelta, rendezvous_s: float) -> None:
    if place.is_alone:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    store = meet(place, rendezvous_s)
    dist.init_process_group(
        backend, timeout=timeout, store=dist.PrefixStore("group", store), rank=place.rank, world_size=place.world_size
    )
    _stores.append(dist.PrefixStore("notes", store))


def says_as_first_rank(message: str) -> bool:
    """Whether rank 0 ends with the very same message, so that this rank need not repeat it.

    Rank 0 leaves its message for the others, who wait `LAST_WORDS_S` for it. Where there is no group, or the store is
    gone with rank 0, the answer is no; nothing is raised.
    """
    store = _stores[-1]
    if store is None or not dist.is_initialized():
        return False
    try:
        if dist.get_rank() == 0:
            store.set(LAST_WORDS, message)
            return False
        store.wait([LAST_WORDS], timedelta(seconds=LAST_WORDS_S))
        return store.get(LAST_WORDS) == message.encode()
    except RuntimeError:  # also what torch.distributed raises of its own
        return False


def _leave() -> None:
    """Destroy the process group, so that none of its threads sees the interpreter shut down, which aborts the process.

    An engine in a reference cycle keeps the group's threads alive beyond its destruction: cycles are freed first.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    del _stores[1:]
