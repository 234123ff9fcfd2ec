"""The settings of `sendvae play`; torch is not needed to read them."""

from __future__ import annotations

from dataclasses import dataclass

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.settings import Benchmark, Direction


@dataclass(kw_only=True)
class PlayConfig:
    """The runs, where attributes come from, and where the page is. Raises `UserError` for a value out of range."""

    runs: tuple[str, ...]
    """Runs of stage 1 or 2, weights of autoencoders, or a demo's folder; several are shown side by side."""
    autoencoder: str | None = None
    """Of generators whose run does not name theirs."""
    image_size: int | None = None
    """Side of the ADM centre crop in pixels; by default that of the autoencoder's run."""
    attributes: str | None = None
    """Pictures with attributes that the sliders move; by default those that a run was trained on, if they have an
    attributes.csv."""
    benchmark: Benchmark = "csv"
    """How `attributes` is laid out, as of `evaluate attributes`."""
    direction: Direction = "pattern"
    """Of the sliders, as of `evaluate traversals`."""
    num_pictures: int = 2000
    """Pictures at most that an attribute's direction is taken from, when a slider is first moved."""
    host: str = "127.0.0.1"
    """Address to listen at. The default serves this machine alone; 0.0.0.0 serves whoever can reach it."""
    port: int = 7860
    """Port to listen at; 0 for any free one."""

    def __post_init__(self) -> None:
        checks.choices(self)
        checks.at_least(1, self, "image_size", "num_pictures")
        checks.in_interval("[0, 65535]", self, "port")
        if not self.runs:
            raise UserError("runs is empty: name one or more runs")
        if self.benchmark != "csv" and self.attributes is None:
            raise UserError(f"benchmark={self.benchmark} goes with --attributes, the folder that it lies in")
