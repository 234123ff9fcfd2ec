"""What every evaluation has: where its results go, and the provenance that they share."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sendvae_fast.engine.run import environment
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import (
    Measurement,
    PicturesOrigin,
    Result,
    WeightsOrigin,
    append_results,
    describe,
)

Say = Callable[[str], object]


@dataclass
class Evaluation:
    """The provenance that the results of one evaluation share. Make it when the work begins: it keeps the time."""

    weights: dict[str, WeightsOrigin] = field(default_factory=dict)
    """By role, as in `Result`."""
    pictures: dict[str, PicturesOrigin] = field(default_factory=dict)
    """By role, as in `Result`."""
    _start_s: float = field(default_factory=time.monotonic)

    def finish(
        self, measurements: Sequence[Measurement], out: Path | None, say: Say, while_training: bool = False
    ) -> list[Result]:
        """The measurements with their provenance, added to the file `out` and said line by line.

        Raises:
            UserError: a value is not finite, or the file cannot be written.
        """
        for measurement in measurements:
            if not math.isfinite(measurement.value):
                raise UserError(
                    f"{measurement.metric} is {measurement.value}: the weights or the pictures are broken; check both"
                )
        shared: dict[str, Any] = {
            "weights": self.weights,
            "pictures": self.pictures,
            "code": code_version(),
            "seconds": round(time.monotonic() - self._start_s, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "while_training": while_training,
        }
        results = [Result(**_fields(measurement), **shared) for measurement in measurements]
        if out is not None:
            append_results(out, results)
        for result in results:
            say(describe(result))
        for remark in dict.fromkeys(remark for result in results for remark in result.remarks):
            say(f"note: {remark}")
        return results


@cache
def code_version() -> dict[str, Any]:
    """Version of the package and commit of its checkout, None outside one."""
    facts = environment()
    return {key: facts[key] for key in ("sendvae_fast", "git_commit")}


def _fields(measurement: Measurement) -> dict[str, Any]:
    return {item.name: getattr(measurement, item.name) for item in dataclasses.fields(measurement)}
