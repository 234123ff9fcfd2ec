"""Send-VAE's alignment for any latent and any target: the mapper, and the loss of its output.

Shape letters: B batch, C latent channels, H latent size, P patch size, N tokens, D width of the target's features.
"""

from __future__ import annotations

from torch import Tensor, nn

from sendvae_fast.losses.alignment import alignment_loss
from sendvae_fast.models.mappers.mapper_config import MapperConfig
from sendvae_fast.models.mappers.transformer_mapper import Mapper


class PatchAlignment(nn.Module):
    """The distance of latents, mapped by a transformer, from a foundation model's features (Equation 2 of Send-VAE).

    ``loss = mean over patches of 1 - cos(mapper(z_t), target)``, between 0 and 2. Its gradient reaches the mapper and
    the latents. Tokens and target patches correspond in row-major order, so both grids must have the same size: with a
    ViT of patch size 14 and latents 8 times smaller than a picture of S pixels, give the ViT one of ``14 S / (8 P)``
    pixels.

    Args:
        latent_channels: C.
        grid_size: tokens per side, H / P; the target has as many.
        target_dim: D.
        sizes: other fields of `MapperConfig` (``width``, ``depth``, ``num_heads``, ``patch_size``,
            ``projector_width``); the paper's where not given.

    Raises:
        UserError: sizes that do not fit together; when called, latents of another size than the mapper's.
        ValueError: when called, a target of another shape than [B, N, D].
    """

    def __init__(self, latent_channels: int, grid_size: int, target_dim: int, **sizes: int) -> None:
        super().__init__()
        self.mapper = Mapper(
            MapperConfig(latent_channels=latent_channels, grid_size=grid_size, target_dim=target_dim, **sizes)
        )

    def forward(self, z_t: Tensor, target: Tensor) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            z_t: normalised latents, noised as `NoiseInjection` does: [B, C, H, H], or as tokens [B, N, C P P].
            target: features of the same pictures [B, N, D] without gradient, in any floating dtype.
        """
        features = self.mapper(z_t)
        if target.shape != features.shape:
            raise ValueError(
                f"target must be {list(features.shape)}, one feature for each token of the latents, got "
                f"{list(target.shape)}: leave out class tokens, and give the target's model a picture size that makes "
                f"{self.mapper.config.grid_size} patches per side"
            )
        return alignment_loss(features, target)
