"""How the ranks of a job find each other: at a store on rank 0, where each waits until all have come."""

import os
import socket
import threading
from datetime import timedelta

import torch.distributed as dist

from sendvae_fast.engine.launch import Place
from sendvae_fast.errors import UserError

RENDEZVOUS_S = 300.0
"""Seconds that ranks wait for each other at the start; a batch system starts them within seconds."""

GRACE_S = 2.0
"""Seconds beyond them after which PyTorch, which should have said so by then, is no longer waited for."""


def meet(place: Place, timeout_s: float = RENDEZVOUS_S) -> dist.Store:
    """Wait at MASTER_ADDR and MASTER_PORT until every rank of the job is there; returns the store they share.

    Args:
        place: of this process, one of several.
        timeout_s: seconds to wait.

    Raises:
        UserError: the port is taken or cannot be reached, or a rank does not come.
    """
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    timeout = timedelta(seconds=timeout_s)
    store = _connect(place, where, timeout)
    # Another job that listens at this port has keys of another name.
    store = dist.PrefixStore(_job_name(), store)
    keys = [f"here/{rank}" for rank in range(place.world_size)]
    try:
        store.set(keys[place.rank], socket.gethostname())
        store.wait(keys, timeout)
    except dist.DistError as error:
        missing = _missing(store, keys)
        who = f"rank {', '.join(map(str, missing))} of {place.world_size}" if missing else "the other ranks"
        raise UserError(
            f"waited {timeout_s:.0f} s at {where} for {who}: look into their logs; if all wait for each other, another "
            "job may listen at that port: set another MASTER_PORT for all of them"
        ) from error
    return store


def _connect(place: Place, where: str, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT.

    In a thread of its own, as PyTorch waits without an end for the first word of a stranger who listens there.
    """
    results: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            results.append(next(iter(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout)))[0])
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + GRACE_S)
    result = results[0] if results else dist.DistError("no answer")
    if isinstance(result, dist.DistError):
        raise UserError(_what_failed(result, place, where, timeout.total_seconds())) from result
    if isinstance(result, Exception):
        raise result
    return result


def _job_name() -> str:
    """What the processes of a job, in this start of it, have in common and other jobs have not."""
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "WORLD_SIZE")
    return "sendvae " + " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def _missing(store: dist.Store, keys: list[str]) -> list[int]:
    try:
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    except dist.DistError:
        return []


def _what_failed(error: Exception, place: Place, where: str, timeout_s: float) -> str:
    words = str(error)
    if "EADDRINUSE" in words:
        return (
            f"rank 0 cannot listen at {where}, because another process of {socket.gethostname()} does: end that "
            "process, or set another MASTER_PORT for all ranks"
        )
    if place.rank == 0:
        return (
            f"waited {timeout_s:.0f} s at {where} for {place.world_size} ranks, and not all came: look into the logs "
            "of the others, and whether a firewall between the nodes lets that port through"
        )
    return (
        f"cannot reach rank 0 at {where} from {socket.gethostname()} within {timeout_s:.0f} s: look into the log of "
        "rank 0, and whether its node's name and that port can be reached from here (MASTER_ADDR and MASTER_PORT name "
        "others)"
    )
