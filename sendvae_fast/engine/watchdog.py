"""A run that no longer moves is ended, and says which rank stopped answering.

A collective waits for every rank. Where one is stopped, killed or stuck, the others would wait for the timeout of the
process group and then fail with words about a socket. Every rank has a thread that counts up in the store of the
process group; whoever has waited too long, or was refused by a collective, looks whose count stands still.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.flight_record import write_records
from sendvae_fast.errors import UserError

EXIT_STUCK = 70
"""Exit code of a run that no longer moved (EX_SOFTWARE); it resumes from its newest checkpoint."""
BEAT_S = 1.0
"""Seconds between signs of life of a rank."""
SILENT_S = 5.0
"""Seconds without a sign of life after which a rank counts as silent, and without a look of its own as stopped."""
SLOW_STEPS = 20
"""A step may take this many times as long as the longest so far, whatever the limit."""


class SilentRankError(UserError):
    """A rank does not answer any more."""

    exit_code = EXIT_STUCK


class Watchdog:
    """Watches that steps go on, from entering the context to leaving it. Collective.

    Args:
        distributed: the ranks.
        limit_s: seconds without a finished step, after the first, that end the process with `EXIT_STUCK`.
        start_limit_s: the same for the first step, in which networks are compiled, and for what is `pausing`.
        folder: where the stacks of this rank's threads are written then, ``stacks_rank<r>.txt``, and, of several
            ranks, its last collectives (`flight_record.write_records`).
    """

    def __init__(self, distributed: Distributed, limit_s: float, start_limit_s: float, folder: Path) -> None:
        self._distributed, self._store, self._folder = distributed, distributed.store, folder
        self._limit_s, self._start_limit_s = limit_s, start_limit_s
        self._step, self._doing, self._longest_s = 0, "starting", 0.0
        self._clock, self._looked, self._stopped_s = threading.Lock(), time.monotonic(), 0.0
        self._since = self._now()
        self._ended = threading.Event()
        # Two, as one that writes to the store of a host that was cut off waits with it.
        self._threads = [
            threading.Thread(target=work, name="watchdog", daemon=True) for work in (self._beat, self._watch)
        ]

    def __enter__(self) -> Self:
        self._show(0)  # at once: a rank that dies in the first second is missed by those that were seen
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; a collective that failed because a rank is gone becomes an error that names the rank."""
        self._doing, self._since = "ending", self._now()
        silent = self._silent_ranks() if isinstance(error, RuntimeError) else []
        self._ended.set()
        for thread in self._threads:
            thread.join(SILENT_S)
        if silent:
            if self._distributed.rank != min(set(range(self._distributed.world_size)) - set(silent)):
                raise SystemExit(EXIT_STUCK) from error
            raise SilentRankError(self._message(silent, "a collective failed")) from error

    def finished(self, step: int) -> None:
        """A step was finished; the next one begins."""
        now = self._now()
        if self._doing == "training":
            self._longest_s = max(self._longest_s, now - self._since)
        self._step, self._doing, self._since = step, "training", now

    @contextmanager
    def pausing(self, doing: str) -> Iterator[None]:
        """Context for what is not a step and may take long: "saving"."""
        self._doing, self._since = doing, self._now()
        yield
        self._doing, self._since = "training", self._now()

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_S):
            count += 1
            self._show(count)

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_S):
            waited, limit = self._now() - self._since, self._start_limit_s
            if self._doing == "training":
                limit = max(self._limit_s, SLOW_STEPS * self._longest_s)
            if waited > limit and not self._ended.is_set():
                self._give_up(waited)
                return

    def _now(self) -> float:
        """Seconds of a clock that stands still while this process is stopped (SIGSTOP, a suspended job or machine)."""
        with self._clock:
            now = time.monotonic()
            if now - self._looked > SILENT_S:
                self._stopped_s += now - self._looked
            self._looked = now
            return now - self._stopped_s

    def _show(self, count: int) -> None:
        if self._store is not None:
            with suppress(dist.DistError):  # where the store's process is gone, the collectives will say so
                self._store.set(f"alive/{self._distributed.rank}", f"{count} {self._step} {self._doing}")

    def _give_up(self, waited: float) -> None:
        ranks = self._distributed
        stacks = self._folder / f"stacks_rank{ranks.rank}.txt"
        try:
            with open(stacks, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"warning: cannot write {stacks} ({error.strerror})", file=sys.stderr, flush=True)
        silent = self._silent_ranks()
        if silent == [0] or ranks.rank == min(set(range(ranks.world_size)) - set(silent), default=ranks.rank):
            why = f"no step was finished for {waited:.0f} s"
            left = f"stacks are in {self._folder}/stacks_rank*.txt"
            if ranks.world_size > 1:
                left += f", the last collectives in {self._folder}/collectives_*_rank*.json"
            print(f"error: {self._message(silent, why)}; {left}", file=sys.stderr, flush=True)
        if ranks.world_size > 1:
            write_records(self._folder, ranks.rank)  # last, as it may hang with a GPU
        os._exit(EXIT_STUCK)

    def _message(self, silent: list[int], why: str) -> str:
        who = "every rank answers, so look at where each one stands"
        if silent:
            names = ", ".join(map(str, silent))
            who = f"rank {names} does not answer" if len(silent) == 1 else f"ranks {names} do not answer"
        elif self._distributed.world_size == 1:
            who = f"the run was {self._doing}"
        return (
            f"{why} after step {self._step}: {who}; look after that machine and run the same command again to go on "
            "from the newest checkpoint"
        )

    def _silent_ranks(self) -> list[int]:
        """The ranks that do not answer; rank 0 alone where its store cannot be reached, which knows of the others."""
        answers: list[list[int]] = []
        thread = threading.Thread(target=lambda: answers.append(self._standing_still()), daemon=True)
        thread.start()
        thread.join(3 * SILENT_S)
        return answers[0] if answers else [0]

    def _standing_still(self) -> list[int]:
        """Other ranks whose counts stand still for `SILENT_S`, or that never counted; none where nothing is known."""
        before = self._counts()
        if self._distributed.rank not in before:
            return []
        time.sleep(SILENT_S)
        after = self._counts()
        return [
            rank
            for rank in range(self._distributed.world_size)
            if rank != self._distributed.rank and (after.get(rank) is None or before.get(rank) == after[rank])
        ]

    def _counts(self) -> dict[int, bytes]:
        """What each rank that can be read wrote last."""
        if self._store is None:
            return {}
        keys = {rank: f"alive/{rank}" for rank in range(self._distributed.world_size)}
        try:
            return {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        except dist.DistError:
            return {}
