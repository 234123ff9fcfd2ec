"""Loss spikes: a warning where the loss leaves its recent level, and a way back to before it."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.streams import ToHost
from sendvae_fast.files import write_atomic
from sendvae_fast.reading import NotOfItsKind, read_json, reading

WINDOW, NUM_NEEDED = 128, 32
"""Steps whose losses are the recent level, and how many of them are needed for a judgement."""
LEAST_SCALE = 0.01
"""Least scale of deviations, as a share of the median: a loss that hardly moves is not judged by its rounding."""
MAX_RETURNS = 3
"""Returns to one checkpoint, after which spikes beyond it are warned of alone."""
LEFT_OUT_FILE = "left_out_steps.json"
"""In a run directory: numbers of steps whose batches are passed over, after returns from spikes."""


class ReturnToCheckpoint(Exception):
    """The run is to go on from its newest checkpoint, which is before a loss spike. The same on every rank."""


class LossSpikes:
    """Compares each loss, averaged over ranks, with the median of those before it; the same on every rank.

    A spike is a robust z-score (loss - median) / (1.4826 MAD) above the threshold, where MAD is the median absolute
    deviation; 1.4826 MAD estimates the standard deviation of normal numbers. A loss is read a step late, when the
    device has the next step to do. Losses that are not finite belong to skipped steps and are passed over.

    Args:
        threshold: z-scores above it are spikes; 0 judges nothing.
    """

    def __init__(self, threshold: float, distributed: Distributed) -> None:
        self._threshold, self._distributed = threshold, distributed
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._unread: tuple[int, ToHost | float] | None = None
        self._quiet_until = 0

    def see(self, step: int, loss: Tensor | float) -> int | None:
        """Take note of a step's loss and judge the one before; the step that spiked, if it did. Collective.

        After a spike the next `WINDOW` steps are judged by nobody: by then the new level is known.
        """
        before, self._unread = self._unread, (step, ToHost(loss) if isinstance(loss, Tensor) else loss)
        if self._threshold == 0 or before is None:
            return None
        number, value = before
        own = value.wait() if isinstance(value, ToHost) else value
        mean = self._distributed.all_reduce_mean(torch.tensor(own, dtype=torch.float64)).item()
        return number if self._is_spike(number, mean) else None

    def _is_spike(self, step: int, loss: float) -> bool:
        if not math.isfinite(loss):
            return False
        score = robust_z_score(loss, self._recent) if len(self._recent) >= NUM_NEEDED else 0.0
        level = statistics.median(self._recent or [loss])
        self._recent.append(loss)
        if score <= self._threshold or step <= self._quiet_until:
            return False
        self._quiet_until = step + WINDOW
        if self._distributed.is_main:
            print(
                f"warning: the loss of step {step} is {loss:.4g}, {score:.0f} robust deviations above the {level:.4g} "
                f"of the steps before it",
                file=sys.stderr,
                flush=True,
            )
        return True


def robust_z_score(value: float, others: Iterable[float]) -> float:
    """(value - median) / (1.4826 MAD) of the others, with a scale of at least `LEAST_SCALE` of the median."""
    others = list(others)
    median = statistics.median(others)
    deviation = 1.4826 * statistics.median(abs(other - median) for other in others)
    scale = max(deviation, LEAST_SCALE * abs(median))
    if scale == 0:
        return math.inf if value > median else 0.0
    return (value - median) / scale


class Returns:
    """Ways back from loss spikes; the same on every rank.

    The run goes back to the newest checkpoint before the steps up to a spike, and passes over their batches: the same
    batches would lead to the same spike.

    Args:
        num_steps: how many steps up to a spike are passed over; 0 goes back from none.
        left_out: where they are noted.
        checkpointer: of the run, when nothing is being written.
    """

    def __init__(self, num_steps: int, left_out: LeftOutSteps, checkpointer: Checkpointer) -> None:
        self._num_steps, self._checkpointer, self.left_out = num_steps, checkpointer, left_out
        self._counts: Counter[int] = Counter()

    def consider(self, spiked: int, saver: BackgroundSaver) -> None:
        """Go back from the spike at a step, if that is asked for and there is a checkpoint before it. Collective.

        Raises:
            ReturnToCheckpoint: the newest checkpoint is now one to go on from.
        """
        if self._num_steps == 0:
            return
        saver.finish()
        first = max(spiked - self._num_steps + 1, 1)
        found = self._checkpointer.load_latest(before=first)
        if found is None or self._counts[found[0]] == MAX_RETURNS:
            why = f"there is no checkpoint before step {first}" if found is None else "it has gone back often enough"
            self.left_out.say(f"the run goes on after its loss spike: {why}")
            return
        self._counts[found[0]] += 1
        self._checkpointer.discard_after(found[0])
        self.left_out.add(range(first, spiked + 1))
        self.left_out.say(f"the run goes back to {found[1].name} and passes over steps {first} to {spiked}")
        raise ReturnToCheckpoint


class LeftOutSteps:
    """The steps of a run whose batches are passed over: those of spikes that it went back from. Collective.

    They are kept in the run's directory, so that a resumed run passes over the same.
    """

    def __init__(self, run: Path, distributed: Distributed) -> None:
        self._path, self._distributed = run / LEFT_OUT_FILE, distributed
        with distributed.all_or_none():
            self._steps = self._read()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, steps: range) -> None:
        """Leave these out, too."""
        self._steps |= set(steps)
        if self._distributed.is_main:
            write_atomic(self._path, json.dumps({"steps": sorted(self._steps)}) + "\n")
        self._distributed.barrier()

    def say(self, words: str) -> None:
        """Warn the user, once for all ranks."""
        if self._distributed.is_main:
            print(f"warning: {words}", file=sys.stderr, flush=True)

    def _read(self) -> set[int]:
        if not self._path.exists():
            return set()
        remedy = "put back a sound copy of it, or remove it to train on every batch"
        content = read_json(self._path, remedy)
        with reading(self._path, remedy):
            steps = content["steps"]
            if not isinstance(steps, list) or not all(isinstance(step, int) for step in steps):
                raise NotOfItsKind("steps is no list of numbers")
        return set(steps)
