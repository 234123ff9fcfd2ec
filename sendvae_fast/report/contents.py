"""The contents of a report, as plain Python and numpy values; `report.load` fills it from disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sendvae_fast.errors import UserError

# One number, one per seed, or None where it could not be measured.
Measured = float | Sequence[float] | None


@dataclass(frozen=True)
class Metric:
    """A row of the comparison table."""

    label: str
    meaning: str
    subject: str
    """The metric as the subject of a sentence."""
    better: Literal["higher", "lower"]
    digits: int
    absent: str = "not measured"
    """A cell's text where there is no value."""


METRICS: Mapping[str, Metric] = {
    "rfid": Metric(
        "Reconstruction distance",
        "Fréchet distance of features, originals to reconstructions, like rFID",
        "The distance of reconstructions from originals",
        "lower",
        2,
    ),
    "psnr": Metric("PSNR, dB", "pixel error of reconstructions", "The PSNR of reconstructions in dB", "higher", 2),
    "ssim": Metric("SSIM", "local structure of reconstructions", "The SSIM of reconstructions", "higher", 3),
    "lpips": Metric(
        "LPIPS",
        "perceptual distance of reconstructions",
        "The LPIPS of reconstructions",
        "lower",
        3,
        "weights not given",
    ),
    "attribute_f1": Metric(
        "Attribute F1",
        "how well a linear probe reads attributes off the latents",
        "The mean F1 of a linear probe for attributes",
        "higher",
        3,
    ),
    "gfid": Metric(
        "Generation distance",
        "Fréchet distance of features, real to generated pictures, like FID",
        "The distance of generated pictures from real ones",
        "lower",
        2,
    ),
}
"""The metrics a variant may have, in the order of the table's rows."""


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

    @property
    def last_step(self) -> int:
        return max((int(steps[-1]) for steps, _ in self.series.values() if len(steps)), default=0)


@dataclass(kw_only=True)
class Variant:
    """One way of training the autoencoder, with its measurements."""

    name: str
    description: str = ""
    metrics: Mapping[str, Measured] = field(default_factory=dict)
    """By keys of `METRICS`."""
    attribute_f1: Mapping[str, Measured] = field(default_factory=dict)
    """F1 of each attribute."""

    def __post_init__(self) -> None:
        unknown = [key for key in self.metrics if key not in METRICS]
        if unknown:
            raise UserError(f"variant {self.name}: unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")


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
    verdict: str = ""
    """One plain sentence on the result."""
    summary: Sequence[str] = ()
    """Further sentences, one paragraph each."""
    tiles: Sequence[Tile] = ()
    variants: Sequence[Variant] = ()
    reconstructions: Sequence[Picture] = ()
    """For a comparison: a strip of originals, then one strip per autoencoder, columns aligned."""
    samples: Sequence[Picture] = ()
    runs: Sequence[RunRecord] = ()
    to_come: Sequence[Step] = ()
    """All steps of an unfinished page, which the browser reloads by itself."""
    written: str = ""
    """Time of day at which an unfinished page was written."""


def seed_values(measured: Measured) -> list[float]:
    """The values of a measurement, one per seed; empty where there is none."""
    if measured is None:
        return []
    return [float(measured)] if isinstance(measured, (int, float)) else [float(value) for value in measured]
