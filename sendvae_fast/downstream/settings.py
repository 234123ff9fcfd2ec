"""The settings of `sendvae downstream`."""

from __future__ import annotations

from dataclasses import dataclass, field

from sendvae_fast import checks
from sendvae_fast.evaluation.settings import EvaluationConfig
from sendvae_fast.sampling.settings import GenerateConfig


@dataclass(kw_only=True)
class DownstreamConfig(EvaluationConfig):
    """The autoencoder's run, the pictures, and the generator. Raises `UserError` for a value out of range."""

    autoencoder: str
    """Run of stage 1 with alignment, or a checkpoint in one: its alignment network is what is measured."""
    train_data: str
    """Pictures that heads are fitted to: scenes of `sendvae data synth`, or any with `trimaps`."""
    data: str
    """Held-out pictures."""
    trimaps: str | None = None
    """Folder of trimaps as the Oxford pets' `annotations/trimaps`, for the pictures of both: segmentation alone."""
    generator: str | None = None
    """Run of stage 2 on this autoencoder's latents: its latents are segmented, and their depth told, undecoded."""
    generate: GenerateConfig = field(default_factory=lambda: GenerateConfig(num_samples=64))
    """How latents are drawn."""
    foundation_weights: str | None = None
    """Weight file of the run's foundation model, where it is no longer where the run had it."""
    image_size: int | None = None
    """Side of the ADM centre crop in pixels; by default that of the run."""
    num_train: int = 1000
    """Pictures at most that heads are fitted to."""
    num_test: int = 500
    """Held-out pictures at most."""
    num_shown: int = 8
    """Pictures in a strip."""
    folder: str = "downstream"
    """Folder of the figures: `held_out.png` and, with a generator, `generated.png`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "image_size", "num_train", "num_test", "num_shown")
        checks.weight_paths(self, "folder")
