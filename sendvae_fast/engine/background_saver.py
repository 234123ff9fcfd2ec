"""Checkpoints that are written beside the training: a step waits for a copy of the state, not for the disk."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.snapshot import Snapshot, Write
from sendvae_fast.engine.streams import HostMemory


class BackgroundSaver:
    """Saves snapshots through a `Checkpointer`, one at a time, in a thread of its own. Every rank makes one.

    The checkpointer's ranks must be those of `Distributed.beside`: its collectives run in the thread. That the
    thread has ended is agreed by the ranks that train, so that all of them see an error at the same step and none waits
    in a collective for another that has left.

    Args:
        checkpointer: used by the thread alone from here on.
        distributed: the ranks that train.
        in_background: False: every save is waited for.
    """

    def __init__(self, checkpointer: Checkpointer, distributed: Distributed, *, in_background: bool = True) -> None:
        self._checkpointer, self._distributed, self._in_background = checkpointer, distributed, in_background
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._saved: Path | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever ended the training, what is being written is worth having; but a second SIGINT leaves at once."""
        if self._thread is not None and not isinstance(error, KeyboardInterrupt):
            self._thread.join()

    def begin(self, step: int, take: Callable[[Snapshot], Write]) -> None:
        """Let `take` copy the state after `step` and begin to write it; first wait for the save before. Collective.

        Raises:
            Exception: see `finish`, for the save before.
        """
        self.finish()
        snapshot = Snapshot(self._memory)
        write = take(snapshot)
        # Daemon: an interpreter that ends without `__exit__` does not wait. What it leaves then has no final name.
        self._thread = threading.Thread(
            target=self._save, args=(step, snapshot, write), name="checkpoint writer", daemon=True
        )
        self._thread.start()
        if not self._in_background:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether a save was begun and is not known to be done; the same on every rank."""
        return self._thread is not None

    def settle(self) -> None:
        """See, without waiting, whether the save is done. Collective while there is one, else nothing; for every step.

        Raises:
            Exception: see `finish`.
        """
        if self._thread is None:
            return
        has_ended = torch.tensor(int(not self._thread.is_alive()))
        if self._distributed.all_reduce_sum(has_ended).item() == self._distributed.world_size:
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the save that was begun last; its directory, or None where it failed as `Checkpointer.save` does.

        Raises:
            Exception: whatever the writer raised, other than a failure of the disk; RuntimeError on the other ranks.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._saved

    def _save(self, step: int, snapshot: Snapshot, write: Write) -> None:
        def write_sound(directory: Path) -> None:
            snapshot.wait()
            write(directory)

        self._saved = None
        try:
            self._saved = self._checkpointer.save(step, write_sound)
        except BaseException as error:
            self._error = error
