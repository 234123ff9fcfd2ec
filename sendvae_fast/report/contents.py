"""The contents of a report, as plain Python and numpy values; `report.load` fills it from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sendvae_fast.evaluation.latent_space.view import LatentView
from sendvae_fast.evaluation.result import Result


@dataclass(kw_only=True)
class Picture:
    """A picture, or a sheet of them."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    title: str
    caption: str
    """Description of the picture."""
    alt: str
    """Text in place of the picture where it cannot be seen."""

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(f"report picture {self.title!r} is {self.image.dtype} {self.image.shape}, not uint8 HWC")


@dataclass(kw_only=True)
class RunRecord:
    """One training run."""

    name: str
    stage: Literal["autoencoder", "generator"]
    series: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Logged values by name: (steps [n], values [n]), finite and in order of steps."""
    duration_s: float
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Result] = ()
    """What `sendvae evaluate`, and the run itself, have measured of it, oldest first."""
    num_parameters: int | None = None
    """Of its newest checkpoint's network."""

    @property
    def last_step(self) -> int:
        return max((int(steps[-1]) for steps, _ in self.series.values() if len(steps)), default=0)

    @property
    def global_batch(self) -> int | None:
        """Pictures in a step, None where nobody says."""
        data = self.config.get("data")
        batch = data.get("global_batch") if isinstance(data, Mapping) else None
        return batch if isinstance(batch, int) else None

    @property
    def num_pictures(self) -> int | None:
        """Pictures that it is trained on, None where nobody says."""
        num = self.environment.get("training_pictures")
        return num if isinstance(num, int) and num > 0 else None

    @property
    def images_seen(self) -> int | None:
        """Pictures seen so far, each as often as it was, None where nobody says."""
        return None if self.global_batch is None else self.last_step * self.global_batch

    @property
    def epochs_per_step(self) -> float | None:
        """Part of the pictures that a step sees, None where nobody says."""
        return None if self.global_batch is None or self.num_pictures is None else self.global_batch / self.num_pictures

    @property
    def epochs(self) -> float | None:
        """How often each picture was seen so far, None where nobody says."""
        return None if self.epochs_per_step is None else self.last_step * self.epochs_per_step


@dataclass(kw_only=True)
class Variant:
    """One way of training the autoencoder, with its measurements."""

    name: str
    description: str = ""
    seeds: Sequence[Sequence[Result]] = ()
    """The results of each seed; none of one that is not measured yet."""
    trials: Sequence[Sequence[RunRecord]] = ()
    """The runs of each seed, where generators measured themselves while they trained."""

    @property
    def metrics(self) -> dict[str, list[Result]]:
        """By metric, the newest result of each seed that has it."""
        found: dict[str, list[Result]] = {}
        for results in self.seeds:
            for metric, result in {result.metric: result for result in results}.items():
                found.setdefault(metric, []).append(result)
        return found

    def differences_from(self, other: Variant, metric: str) -> list[float]:
        """What is more of a metric than in another variant, by each seed that both have."""
        pairs = [
            [next((result.value for result in reversed(results) if result.metric == metric), None) for results in both]
            for both in zip(self.seeds, other.seeds, strict=False)
        ]
        return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]

    @property
    def attribute_f1(self) -> dict[str, list[float]]:
        """F1 of each attribute, one value per seed that has it."""
        found: dict[str, list[float]] = {}
        for result in self.metrics.get("attribute_f1", []):
            for attribute, value in result.details.get("f1", {}).items():
                found.setdefault(attribute, []).append(value)
        return found


@dataclass(kw_only=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    detail: str = ""


@dataclass(kw_only=True)
class Step:
    """A part of the work behind an unfinished comparison."""

    name: str
    state: Literal["done", "running", "to come"]
    fraction: float = 0.0
    """How much of it is done, 0 to 1."""
    when: str = ""
    """When it will be done."""


@dataclass(kw_only=True)
class ReportData:
    """The contents of a page. Sections without content are left out."""

    title: str
    subtitle: str = ""
    headline: str = ""
    """One plain sentence under the title."""
    summary: Sequence[str] = ()
    """Further sentences, one paragraph each."""
    tiles: Sequence[Tile] = ()
    variants: Sequence[Variant] = ()
    control: str = ""
    """Name of the variant that the others are put beside."""
    reconstructions: Sequence[Picture] = ()
    """For a comparison: a strip of originals, then one strip per autoencoder, columns aligned."""
    samples: Sequence[Picture] = ()
    latent_views: Sequence[tuple[str, LatentView]] = ()
    """Name of each autoencoder, and what there is to see of its latents."""
    runs: Sequence[RunRecord] = ()
    """In a comparison those of its variants, else the ones that the page is about."""
    to_come: Sequence[Step] = ()
    """All steps of an unfinished page, which the browser reloads by itself."""
    written: str = ""
    """Time of day at which an unfinished page was written."""
