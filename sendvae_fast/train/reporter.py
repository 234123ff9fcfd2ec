"""How a run is followed: its header, its lines, its metrics and pictures, its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.flops import peak_flops
from sendvae_fast.engine.metrics import MetricsLogger
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import LoggingConfig
from sendvae_fast.progress import Progress
from sendvae_fast.train.run_words import count_words, device_words, footer, header, ops_facts, step_line
from sendvae_fast.train.stage import Stage
from sendvae_fast.train.step_clock import StepClock

T = TypeVar("T")
SHOWN = ("loss", "psnr", "velocity", "align")
"""Values shown beside the progress bar."""


class Reporter:
    """Says, on rank 0, and records how a run goes. Every method is called on every rank.

    Args:
        stage: what is trained.
        run: whose metrics are written.
        num_steps: steps of the run.
        global_batch: images per step, over all ranks.
        distributed: the ranks.
        logging: the loggers beside metrics.jsonl.
    """

    def __init__(
        self,
        stage: Stage,
        run: RunDirectory,
        num_steps: int,
        global_batch: int,
        distributed: Distributed,
        logging: LoggingConfig | None,
    ) -> None:
        self._stage, self._run, self._num_steps, self._distributed = stage, run, num_steps, distributed
        self._logging = logging
        self._flops = None if stage.flops_by_part is None else sum(stage.flops_by_part.values())
        peak = peak_flops(distributed.device, stage.dtype)
        self._clock = StepClock(
            distributed.device,
            global_batch,
            self._flops,
            None if peak is None else peak * distributed.world_size,
        )
        self._window = MetricsWindow()
        self.shown: dict[str, float] = {}
        """What the progress bar shows: the means of the last line."""

    @contextmanager
    def following(self, step: int) -> Iterator[Progress]:
        """Context of the steps after `step`: header, progress, and loggers that are closed at its end."""
        self._logger = MetricsLogger(self._run, self._distributed, step, self._logging)
        facts = {"device": device_words(self._distributed), **ops_facts(), **self._stage.facts()}
        if self._flops is not None:
            facts["arithmetic"] = f"{count_words(self._flops)}FLOP per image"
        self._say(header(self._stage.title, self._run, step, self._num_steps, facts))
        self._clock.read()
        try:
            with Progress(self._stage.title, self._num_steps, "step", start=step) as progress:
                yield progress
        finally:
            self._logger.close()

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch, with the time that it took."""
        return self._clock.fetch(batches)

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Take in what a step logs."""
        self._window.add(values)

    def report(self, step: int, progress: Progress) -> None:
        """Log and print the window that ends after `step`; begin another. Collective."""
        self._window.add({**self._clock.read(), "learning_rate": self._stage.learning_rate})
        values = self._window.mean(self._distributed)
        self._logger.log(step, values)
        self.shown = {name: values[name] for name in SHOWN if name in values}
        progress.say(step_line(step, self._num_steps, values, progress.rate_per_s, time.time()))

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Context for what is no step: its time does not count."""
        began_s = time.monotonic()
        yield
        self._clock.leave_out(time.monotonic() - began_s)

    def preview(self, step: int) -> None:
        """Have the stage draw its previews, and show them. Collective."""
        self._stage.preview(step, self._run.samples)
        self._logger.pictures(step, self._run.samples)

    def measured(self, step: int, values: dict[str, float]) -> None:
        """Record what an evaluation has measured."""
        if values:
            self._logger.log(step, values)

    def ended(self, step: int) -> None:
        """Say where the run is saved, and what to run next."""
        self._say(footer(self._stage.title, self._run, step, self._num_steps, self._stage.next_command()))

    def _say(self, words: str) -> None:
        if self._distributed.is_main and not Progress.is_silent():
            print(words, file=sys.stderr, flush=True)


class MetricsWindow:
    """Means of logged scalars since the last report, kept on the device so that no step waits for the host."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else float(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def mean(self, distributed: Distributed) -> dict[str, float]:
        """The means over steps and ranks, as numbers; starts a new window. Collective."""
        own = [float(total) / self._counts[name] for name, total in self._sums.items()]
        means = distributed.all_reduce_mean(torch.tensor(own, dtype=torch.float64)).tolist()
        named = dict(zip(self._sums, means, strict=True))
        self._sums, self._counts = {}, {}
        return named
