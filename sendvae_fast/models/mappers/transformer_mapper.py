"""The mapper h_φ of Send-VAE: from noised latents to the feature space of a frozen foundation model.

Section 3.2 of the paper: "a patch embedding layer, followed by" transformer layers "and an MLP projector". It sees
neither the noise level nor the class, and is dropped after stage 1.

Shape letters: B batch, C latent channels, N tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.mappers.latent_mapper import LatentMapper
from sendvae_fast.models.mappers.mapper_config import MapperConfig
from sendvae_fast.models.positions import sincos_2d
from sendvae_fast.models.transformer import Attention, LayerNorm, Mlp, PatchEmbed, init_transformer, projector


class Mapper(LatentMapper):
    """Noised, normalised latents [B, C, grid P, grid P] to features [B, N, target_dim], one per patch, row-major.

    Latents may come as flattened patches [B, N, C P P], see `PatchEmbed`. `noise` says whether they are to be noised.
    """

    reads = "z_t"

    def __init__(self, config: MapperConfig, noise: bool = True):
        super().__init__()
        self.config = config
        self.patch_size, self.noise = config.patch_size, noise
        self.patch_embed = PatchEmbed(config.patch_size, config.latent_channels, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(config.depth))
        self.projector = projector(config.width, config.projector_width, config.target_dim)
        init_transformer(self)
        # A function of the configuration, so it is neither trained nor saved.
        self.register_buffer("pos_embed", sincos_2d(config.width, config.grid_size), persistent=False)  # [N, D]

    def forward(self, z_t: Tensor) -> Tensor:
        config = self.config
        expected = (config.grid_size * config.patch_size,) * 2
        if z_t.dim() == 3:
            expected = (config.grid_size**2, config.latent_channels * config.patch_size**2)
        if z_t.shape[-2:] != expected:
            raise UserError(
                f"the mapper was built for latents of {expected[0]} x {expected[1]} but got {z_t.shape[-2]} x "
                f"{z_t.shape[-1]}: set mapper grid_size * patch_size to the latent size (image size / downsampling)"
            )
        x = self.patch_embed(z_t)
        x = x + self.pos_embed.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.projector(x)


class Block(nn.Module):
    """Pre-norm transformer layer [B, N, D] to [B, N, D], as timm's ``Block``."""

    compiles = recomputes = True  # see `engine.blocks`

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, approximate="none")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
