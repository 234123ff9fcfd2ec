"""A run measures itself every so many steps, as `sendvae evaluate` measures its checkpoints, and changes nothing."""

from __future__ import annotations

import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.job import Evaluation
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.result import RESULTS_FILE, Measurement, Result, read_results, write_results
from sendvae_fast.progress import Progress


class Evaluator(ABC):
    """Measures a stage at its interval. Every rank makes one and calls it at the same steps.

    Results are added to the run's `evaluation.jsonl`, marked as made while training. What is given is looked at when it
    is made, before the first step; what goes wrong later is a warning, and training goes on.

    Args:
        run: the run's directory.
        every: steps between evaluations; the last step always has one.
        num_steps: of the run.
        distributed: the ranks, which share the work.
    """

    chunk = 256
    """Pictures per file, as ranks share them: a few thousand pictures are enough for many ranks."""

    def __init__(self, run: Path, every: int, num_steps: int, distributed: Distributed) -> None:
        self.every, self.num_steps, self.ranks = every, num_steps, distributed
        self.results = run / RESULTS_FILE
        self.folder = run / f"{RESULTS_FILE}.training"
        """Of features, while they are needed."""

    @abstractmethod
    def measure(self, stage: Any, step: int) -> tuple[Evaluation, list[Measurement]]:
        """The provenance and, on rank 0, the numbers of the weights after `step`. Collective."""

    def resume(self, step: int) -> bool:
        """Forget results of later steps, which will come again; whether that of `step` is still owed. Collective.

        Raises:
            UserError: the run's results are damaged.
        """
        owed, problem = False, None
        if self.ranks.is_main:
            try:
                results = read_results(self.results)
                kept = [result for result in results if not result.while_training or (result.step or 0) <= step]
                if len(kept) < len(results):
                    write_results(self.results, kept)
                measured = {result.step for result in kept if result.while_training}
                owed = step > 0 and self.is_due(step) and step not in measured
            except UserError as error:
                problem = str(error)
        owed, problem = self.ranks.broadcast_object((owed, problem))
        if problem is not None:
            raise UserError(problem)
        return owed

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after so many steps."""
        return step % self.every == 0 or step == self.num_steps

    def evaluate(self, stage: Any, step: int) -> dict[str, float]:
        """Measure and record; on rank 0 the numbers to log (see `logged`), on others none. Collective."""
        results, problem = [], None
        try:
            with Progress.silenced():
                evaluation, measured = self.measure(stage, step)
            if self.ranks.is_main:
                results = evaluation.finish(measured, self.results, say=lambda line: None, while_training=True)
        except UserError as error:  # on all ranks, or on rank 0 after all have done their share
            problem = error
        if not self.ranks.is_main:
            return {}
        if problem is not None:
            print(f"warning: step {step} was not evaluated ({problem}); training goes on", file=sys.stderr, flush=True)
        shutil.rmtree(self.folder if step == self.num_steps else self.folder / "samples", ignore_errors=True)
        return logged(results)


def logged(results: list[Result]) -> dict[str, float]:
    """Results as numbers to log: ``evaluation/<metric>``, ``evaluation/num_<pictures>`` and ``evaluation/seconds``."""
    if not results:
        return {}
    counts = {f"evaluation/num_{what}": float(num) for result in results for what, num in result.counts.items()}
    values = {f"evaluation/{result.metric}": result.value for result in results}
    return {**values, **counts, "evaluation/seconds": results[0].seconds}


def spread_over(catalog: Catalog, num: int, image_size: int) -> CatalogPictures:
    """At most `num` pictures of a catalog, at even distances in its order, which is that of classes."""
    ids = np.linspace(0, len(catalog) - 1, min(num, len(catalog)), dtype=np.int64)
    return CatalogPictures(catalog if len(ids) == len(catalog) else catalog.subset(ids), image_size)
