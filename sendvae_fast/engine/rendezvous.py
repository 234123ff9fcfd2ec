"""How the ranks of a job find each other: at a store on rank 0, where each waits until all have come."""

import os
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from sendvae_fast.engine.launch import Place
from sendvae_fast.errors import UserError

RENDEZVOUS_S = 300.0
"""Seconds that ranks wait for each other at the start; a batch system starts them within seconds."""

GRACE_S = 2.0
"""Seconds beyond them after which PyTorch, which should have said so by then, is no longer waited for."""

NOTICE_S = 5.0
"""Seconds of waiting after which a rank says where and for whom it waits."""

ANSWER_S = 60.0
"""Seconds in which who listens at rank 0's place answers PyTorch; another program may never say a word."""

LISTENS_S = 0.5
"""Seconds between looks whether somebody listens there."""

POLL_S = 0.1
"""Seconds between looks at the store while ranks meet."""

INVITATION = "invitation"
"""Key of the name of a start and of the processes that it is for."""


def meet(place: Place, timeout_s: float = RENDEZVOUS_S) -> dist.Store:
    """Wait at MASTER_ADDR and MASTER_PORT until every rank of the job is there; returns the store they share.

    Args:
        place: of this process, one of several.
        timeout_s: seconds to wait.

    Raises:
        UserError: the port is taken or cannot be reached, or a rank does not come.
    """
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    notice = threading.Timer(NOTICE_S, _say_waiting, (place, where, timeout_s))
    notice.daemon = True
    notice.start()
    try:
        return _meet_at(where, place, timeout_s)
    finally:
        notice.cancel()


def _say_waiting(place: Place, where: str, timeout_s: float) -> None:
    """Tell whoever starts a job by hand, or looks into the log of a node: not of each of its ranks."""
    if place.rank <= 1 or place.local_rank == 0:
        who, whom = f"rank {place.rank} on {socket.gethostname()}", "the other ranks" if place.rank == 0 else "rank 0"
        print(f"{who}: waiting at {where} for {whom}, for {timeout_s:.0f} s at most", file=sys.stderr, flush=True)


def _meet_at(where: str, place: Place, timeout_s: float) -> dist.Store:
    deadline = time.monotonic() + timeout_s
    store = _connect(place, where, timedelta(seconds=timeout_s))
    # Another job that listens at this port has keys of another name.
    store = dist.PrefixStore(_job_name(), store)
    try:
        start = _invite(store, place.world_size, deadline) if place.rank == 0 else _be_invited(store, place, deadline)
    except dist.DistError as error:
        missing = _missing(store, place.world_size)
        who = f"rank {', '.join(map(str, missing))} of {place.world_size}" if missing else "the other ranks"
        raise UserError(
            f"waited {timeout_s:.0f} s at {where} for {who}: look into their logs; if all wait for each other, another "
            "job may listen at that port: set another MASTER_PORT for all of them"
        ) from error
    return dist.PrefixStore(start, store)


def _invite(store: dist.Store, num_ranks: int, deadline: float) -> str:
    """Rank 0's part: the name of this start of the job, once every rank has accepted it.

    torchrun keeps its store when it starts its workers again, with all that earlier starts wrote: ranks that took that
    for theirs would look for processes that are gone. Each process says its own random name at the key of its rank;
    rank 0 names a start, with the processes that it is for, and anew when another has come in the place of one.
    """
    store.set(_here(0), uuid.uuid4().hex)
    keys = [_here(rank) for rank in range(num_ranks)]
    store.wait(keys, _left(deadline))
    invited, start = [], ""
    while time.monotonic() < deadline:
        present = [name.decode() for name in store.multi_get(keys)]
        if present != invited:
            invited, start = present, uuid.uuid4().hex
            store.set(_accepted(start, 0), "")
            store.set(INVITATION, " ".join([start, *invited]))
        if store.check([_accepted(start, rank) for rank in range(num_ranks)]):
            store.set(_begun(start), "")
            return start
        time.sleep(POLL_S)
    raise dist.DistStoreError("not every process that was invited has come")


def _be_invited(store: dist.Store, place: Place, deadline: float) -> str:
    """The part of every other rank: the name of the start that it was invited to and that has begun."""
    name, accepted = uuid.uuid4().hex, ""
    store.set(_here(place.rank), name)
    store.wait([INVITATION], _left(deadline))
    while time.monotonic() < deadline:
        start, *invited = store.get(INVITATION).decode().split()
        if start != accepted and invited[place.rank : place.rank + 1] == [name]:
            store.set(_accepted(start, place.rank), "")
            accepted = start
        if accepted and store.check([_begun(accepted)]):
            return accepted
        time.sleep(POLL_S)
    raise dist.DistStoreError("not invited by rank 0")


def _here(rank: int) -> str:
    return f"here/{rank}"


def _accepted(start: str, rank: int) -> str:
    return f"{start}/accepted/{rank}"


def _begun(start: str) -> str:
    return f"{start}/begun"


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def _connect(place: Place, where: str, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT.

    In a thread of its own, as PyTorch waits without an end for the first word of a stranger who listens there. And only
    once somebody does: PyTorch itself looks ever more rarely, up to once in a minute.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while place.rank > 0 and not _somebody_listens() and time.monotonic() < deadline:
        time.sleep(LISTENS_S)
    results: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            found = dist.rendezvous("env://", place.rank, place.world_size, timeout=_left(deadline))
            results.append(next(iter(found))[0])
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(min(ANSWER_S, _left(deadline).total_seconds() + GRACE_S))
    if not results and place.rank > 0 and time.monotonic() < deadline and _somebody_listens():
        raise UserError(
            f"who listens at {where} is not rank 0: end that program, or set another MASTER_PORT for all ranks; rank 0 "
            "will have said that the port is taken"
        )
    thread.join(_left(deadline).total_seconds() + GRACE_S)
    result = results[0] if results else dist.DistError("no answer")
    if isinstance(result, dist.DistError):
        raise UserError(_what_failed(result, place, where, timeout.total_seconds())) from result
    if isinstance(result, Exception):
        raise result
    return result


def _somebody_listens() -> bool:
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=NOTICE_S).close()
    except OSError:
        return False
    return True


def _job_name() -> str:
    """What the processes of a job, in this start of it, have in common and other jobs have not."""
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "WORLD_SIZE")
    return "sendvae " + " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def _missing(store: dist.Store, num_ranks: int) -> list[int]:
    try:
        return [rank for rank in range(num_ranks) if not store.check([_here(rank)])]
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
