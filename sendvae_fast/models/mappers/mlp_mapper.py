"""An MLP from latents to the feature space of a foundation model, for ReaLS.

ReaLS (arXiv:2502.00359) says no more of its network than that it is an MLP: depth, activation and widths are ours, and
those of REPA's projector. Shape letters: B batch, C latent channels, P patch size, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from sendvae_fast.models.mappers.latent_mapper import LatentMapper
from sendvae_fast.models.transformer import init_transformer, projector


class MLPMapper(LatentMapper):
    """Patches of normalised latents [B, N, C P P] to features [B, N, target_dim], each patch by itself."""

    reads = "z_t"

    def __init__(
        self, latent_channels: int, target_dim: int, *, width: int, patch_size: int = 1, noise: bool = False
    ) -> None:
        super().__init__()
        self.patch_size, self.noise = patch_size, noise
        self.projector = projector(latent_channels * patch_size**2, width, target_dim)
        init_transformer(self)

    def forward(self, z_t: Tensor) -> Tensor:
        return self.projector(z_t)
