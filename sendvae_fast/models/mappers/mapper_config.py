"""Sizes of Send-VAE's mapper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sendvae_fast import checks
from sendvae_fast.errors import UserError


@dataclass(kw_only=True)
class MapperSizes:
    """Sizes of a `Mapper` that are its own, whatever latents and foundation model it lies between.

    Raises `UserError` for a value out of range, or a width that heads or positions do not divide.
    """

    section: ClassVar[str] = "mapper"
    """What the sizes are settings of, for messages."""

    width: int = 768
    """Width of the transformer. The paper: the foundation model's, 768 or 1024."""
    depth: int = 1
    """Transformer layers: 0, 1 (the paper's best) or more. 0 leaves patch embedding and projector."""
    num_heads: int = 12
    """Attention heads. The paper: 12 for width 768, 16 for 1024."""
    projector_width: int = 2048
    """Hidden width of the MLP projector."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "num_heads", "projector_width", where=self.section)
        checks.at_least(0, self, "depth", where=self.section)
        if self.width < 4 or self.width % 4 or self.width % self.num_heads:
            raise UserError(
                f"{self.section}.width={self.width} must be a multiple of 4 (sine-cosine positions) and of "
                f"num_heads={self.num_heads}"
            )


@dataclass(kw_only=True)
class MapperConfig(MapperSizes):
    """All sizes of a `Mapper`. Raises `UserError` for a value out of range."""

    latent_channels: int
    """Channels of the latent."""
    grid_size: int
    """Patch tokens per side; must equal the foundation model's. The latent has ``grid_size * patch_size`` per side."""
    target_dim: int
    """Width of the foundation model's features."""
    patch_size: int = 1
    """Latent positions per token and side: 1 for f16 latents, 2 for f8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "latent_channels", "grid_size", "target_dim", "patch_size", where=self.section)
