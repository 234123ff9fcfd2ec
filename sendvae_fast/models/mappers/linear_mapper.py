"""VA-VAE's way from latents to the feature space of a foundation model: one linear map, without bias.

Shape letters: B batch, C latent channels, H W latent size, P patch size, N tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from sendvae_fast.models.mappers.latent_mapper import LatentMapper


class LinearMapper(LatentMapper):
    """Samples of the posterior [B, C, H, W], as the decoder takes them, to features [B, N, target_dim], row-major.

    A 1x1 convolution as in VA-VAE (its `reverse_proj`); with a patch size P one of P x P and that stride.
    """

    reads = "z"
    patch_size = None
    noise = False

    def __init__(self, latent_channels: int, target_dim: int, patch_size: int = 1) -> None:
        super().__init__()
        self.proj = nn.Conv2d(latent_channels, target_dim, patch_size, stride=patch_size, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)
