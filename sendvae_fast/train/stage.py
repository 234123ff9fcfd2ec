"""The interface of a training stage to the loop that drives it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sendvae_fast.engine.snapshot import Snapshot, Write


class Stage(Protocol):
    """The interface of a training stage to the loop."""

    title: str
    dtype: torch.dtype
    """In which the networks compute."""
    learning_rate: float
    flops_by_part: dict[str, int] | None
    """Floating-point operations of a training step per image, by part; None where they are not known, or nobody reads
    them."""

    def facts(self) -> dict[str, str]:
        """What is trained on what, for the header: "pictures", "parameters"."""
        ...

    def next_command(self) -> str:
        """The command that a finished run is for."""
        ...

    def train_step(self, step: int, batch: Any) -> dict[str, Tensor | float]:
        """One optimizer step on this rank's share of the global batch; returns scalars to log."""
        ...

    def batches(self, start_step: int) -> Iterator[Any]:
        """This rank's batches from `start_step` on."""
        ...

    def snapshot(self, snapshot: Snapshot) -> Write:
        """Copy every weight and optimizer state; the result writes them into a checkpoint directory. Collective."""
        ...

    def load(self, directory: Path) -> None:
        """Read what was written of a `snapshot`, whatever world size wrote it. Called on every rank."""

    def preview(self, step: int, directory: Path) -> None:
        """Write preview pictures into `directory`. Called on every rank."""


class StageEvaluator(Protocol):
    """The interface of an evaluator (`train.evaluator.Evaluator`) to the loop. Every call is on every rank."""

    def resume(self, step: int) -> bool:
        """Forget what was measured after `step`; whether an evaluation of it is still owed."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after `step`."""
        ...

    def evaluate(self, stage: Any, step: int) -> dict[str, float]:
        """Measure the weights after `step`; returns numbers to log."""
        ...
