"""The settings of evaluations while training: which pictures, how many, and with which features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sendvae_fast import checks
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.sampling.settings import GenerateConfig, SamplerConfig
from sendvae_fast.train.settings import LoopConfig


@dataclass(kw_only=True)
class ReconstructionWhileTraining:
    """What stage 1 reconstructs every `loop.evaluate_every` steps. Raises `UserError` for a value out of range."""

    default_every: ClassVar[int] = 5_000

    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The feature network of the Fréchet distance, which is rFID with Inception's."""
    data: str | None = None
    """Held-out pictures, anything that `data.root` takes; null: those it trains on, which the results then say."""
    num_pictures: int = 5_000
    """Pictures at most, spread evenly over the classes."""
    batch_size: int = 64
    """Pictures at once on a rank."""

    def __post_init__(self) -> None:
        checks.at_least(2, self, "num_pictures", where="evaluation")
        checks.at_least(1, self, "batch_size", where="evaluation")


@dataclass(kw_only=True)
class GenerationWhileTraining:
    """What stage 2 draws every `loop.evaluate_every` steps. Raises `UserError` for a value out of range."""

    default_every: ClassVar[int] = 25_000

    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The feature network. FID, Inception score, precision and recall are Inception's."""
    generate: GenerateConfig = field(
        default_factory=lambda: GenerateConfig(
            num_samples=5_000, guidance_scale=1.0, sampler=SamplerConfig(num_steps=50)
        )
    )
    """How pictures are drawn from the averaged weights. Without guidance, as epochs to a FID are counted, and with a
    fifth of the paper's steps."""
    reference: str | None = None
    """Real pictures, or an npz of pictures or moments, as `sendvae evaluate generation` takes it; null: `data.root`."""
    num_reference: int = 10_000
    """Pictures of the reference at most, spread evenly over the classes; an npz is taken whole."""

    def __post_init__(self) -> None:
        checks.at_least(2, self, "num_reference", where="evaluation")


def steps_between(loop: LoopConfig, evaluation: ReconstructionWhileTraining | GenerationWhileTraining) -> int | None:
    """`loop.evaluate_every` with its null resolved; None where nothing is evaluated."""
    if loop.evaluate_every is not None:
        return loop.evaluate_every
    return evaluation.default_every if evaluation.features.has_weights else None
