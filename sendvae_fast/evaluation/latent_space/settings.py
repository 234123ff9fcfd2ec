"""The settings of measures of a latent space; torch is not needed to read them."""

from __future__ import annotations

from dataclasses import dataclass

from sendvae_fast import checks
from sendvae_fast.errors import UserError

LEAST_POINTS = 100
"""Points below which t-SNE at this perplexity says nothing."""


@dataclass(kw_only=True)
class UniformityConfig:
    """Size of the measurement. Raises `UserError` for a value out of range."""

    num_points: int = 10_000
    """Points in a run, at most; one of each picture."""
    num_runs: int = 10
    """Runs whose mean is taken."""

    def __post_init__(self) -> None:
        checks.at_least(LEAST_POINTS, self, "num_points", where="uniformity")
        checks.at_least(1, self, "num_runs", where="uniformity")


@dataclass(kw_only=True)
class LearnabilityConfig:
    """The small SiT and its training. Raises `UserError` for a value out of range."""

    num_steps: int = 1000
    """Steps of AdamW."""
    batch_size: int = 64
    """Latents in a step."""
    learning_rate: float = 1e-3
    """Constant."""
    depth: int = 4
    """Blocks."""
    width: int = 128
    """Of the tokens; 32 to an attention head."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "num_steps", "batch_size", "depth", where="learnability")
        checks.at_least(32, self, "width", where="learnability")
        checks.above(0, self, "learning_rate", where="learnability")


@dataclass(kw_only=True)
class DiscriminationConfig:
    """The mixtures. Raises `UserError` for a value out of range."""

    components: tuple[int, ...] = (50, 100, 200)
    """Gaussians in each mixture; those that are too many for the pictures are left out."""
    num_dims: int = 64
    """Of the PCA; log-likelihoods of different ones cannot be compared."""
    num_pictures: int = 50_000
    """Pictures at most, drawn at random."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "num_dims", "num_pictures", where="discrimination")
        if not self.components or min(self.components) < 1:
            raise UserError(f"discrimination.components is {self.components}: it must name numbers of at least 1")


@dataclass(kw_only=True)
class ViewsConfig:
    """Which held-out pictures are looked at. Raises `UserError` for a value out of range."""

    num_pictures: int = 500
    """Pictures at most: points of t-SNE, and what means are over."""
    num_classes: int = 10
    """Classes at most, from all over the list, with as many pictures each."""
    num_shown: int = 6
    """Pictures whose maps of patch similarity are drawn."""

    def __post_init__(self) -> None:
        checks.at_least(2, self, "num_pictures", where="views")
        checks.in_interval("[1, 12]", self, "num_classes", where="views")
        checks.at_least(1, self, "num_shown", where="views")
