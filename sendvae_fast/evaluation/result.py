"""Results: a number together with everything that decides it, as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic
from sendvae_fast.reading import read_text, reading

RESULTS_FILE = "evaluation.jsonl"
"""In a run: a line per result, the newest last."""


@dataclass(frozen=True, kw_only=True)
class FeaturesOrigin:
    """The network whose features a metric compares."""

    name: str
    """As in the metric's name: inception, dinov2_l, demo."""
    dim: int
    """Features per picture."""
    weights: str
    """Weight file."""
    sha256: str
    """Of that file."""


@dataclass(frozen=True, kw_only=True)
class WeightsOrigin:
    """A network that was measured."""

    path: str
    """Weight file or folder; of a run, its checkpoint."""
    sha256: str
    """Of the weights' names and values."""
    step: int | None = None
    """Training step of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class PicturesOrigin:
    """Pictures that were measured, or compared with."""

    path: str
    num_pictures: int
    image_size: int
    """Side in pixels, after the crop."""
    sha256: str
    """Of what `hash_of` says."""
    hash_of: str
    """``contents`` (of an indexed catalog's pictures, or of an npz), ``names``, or ``settings`` (of pictures that were
    drawn as they were measured)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the sampling, where the pictures are samples."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number and how it was measured."""

    metric: str
    """Its name, which says its features: ``fid``, ``frechet_demo``, ``psnr``."""
    value: float
    protocol: str
    """Name of the rules it was measured by."""
    interval: tuple[float, float] | None = None
    """95 % confidence, where the metric has one; `interval_of` says what varies in it."""
    interval_of: str = ""
    features: FeaturesOrigin | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    """Pictures on each side, as ``samples`` and ``reference``."""
    remarks: tuple[str, ...] = ()
    """What a reader must know before comparing the number with another."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Parts of the number, such as the F1 of each attribute."""


@dataclass(frozen=True, kw_only=True)
class Result(Measurement):
    """A measurement with its provenance."""

    weights: Mapping[str, WeightsOrigin] = field(default_factory=dict)
    """By role: ``autoencoder``, ``generator``."""
    pictures: Mapping[str, PicturesOrigin] = field(default_factory=dict)
    """By role: ``data``, ``samples``, ``reference``, ``train``, ``test``."""
    code: Mapping[str, Any] = field(default_factory=dict)
    """Version of the package and commit of its checkout."""
    seconds: float = 0.0
    """Of the evaluation that gave this and the results beside it."""
    finished: str = ""
    """UTC, ISO 8601."""
    while_training: bool = False
    """Whether the run measured itself, at an interval of its steps (`loop.evaluate_every`)."""

    @property
    def step(self) -> int | None:
        """Training step of the generator, or where there is none of the autoencoder; None where it is not known."""
        origin = self.weights.get("generator") or self.weights.get("autoencoder")
        return None if origin is None else origin.step


def append_results(path: Path, results: Sequence[Result]) -> None:
    """Add a JSON line per result to a file; it appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if not before.endswith("\n"):
            before += "\n" * bool(before)  # a line that was cut off
        write_atomic(path, before + _lines(results))
    except OSError as error:
        raise UserError(f"cannot write the results to {path} ({error.strerror}): give another --out") from error


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write a file of results in place of the one that is there.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_atomic(path, _lines(results))
    except OSError as error:
        raise UserError(
            f"cannot write the results to {path} ({error.strerror}): make room, or look at its rights"
        ) from error


def _lines(results: Sequence[Result]) -> str:
    return "".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in results)


def read_results(path: Path) -> list[Result]:
    """The results in a file, oldest first; empty where there is no file.

    Raises:
        UserError: a line is not a result.
    """
    if not path.is_file():
        return []
    results = []
    with reading(path, "remove it and evaluate again"):
        lines = read_text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        with reading(f"{path}, line {number}", "it is not a result of `sendvae evaluate`; remove it"):
            results.append(result_of(json.loads(line)))
    return results


def result_of(record: Mapping[str, Any]) -> Result:
    """The result that a JSON record stands for.

    Raises:
        TypeError: it lacks a field, or has one that results do not have.
    """
    parts: dict[str, Any] = dict(record)
    if parts.get("features") is not None:
        parts["features"] = FeaturesOrigin(**parts["features"])
    if parts.get("interval") is not None:
        parts["interval"] = tuple(parts["interval"])
    parts["remarks"] = tuple(parts.get("remarks", ()))
    parts["weights"] = {role: WeightsOrigin(**origin) for role, origin in parts.get("weights", {}).items()}
    parts["pictures"] = {role: PicturesOrigin(**origin) for role, origin in parts.get("pictures", {}).items()}
    return Result(**parts)


def describe(measurement: Measurement) -> str:
    """One line: name, value, interval, protocol, counts."""
    interval = "" if measurement.interval is None else " [{:.4g}, {:.4g}]".format(*measurement.interval)
    counts = ", ".join(f"{count:,} {what}" for what, count in measurement.counts.items())
    return f"{measurement.metric:24s} {measurement.value:<10.5g}{interval}  {measurement.protocol}; {counts}"
