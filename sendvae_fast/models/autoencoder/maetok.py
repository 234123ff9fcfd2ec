"""MAETok (Chen et al., ICML 2025): a vision transformer that writes a picture into a sequence of latent tokens.

The encoder reads the picture's patches and, behind them, learned latent tokens; what it makes of these, brought to a
few channels, is the latent: no grid of the picture, and no distribution. The decoder reads one learned mask token for
each patch and the latent behind them, and its patches become pixels. Patches are told apart by learned positions and by
rotary ones whose frequencies are learned for every head, latent tokens by learned positions alone. Encoding and
decoding only: how a MAETok is trained (masked pictures, auxiliary decoders) is not here.

Architecture and parameter names are those of its authors' published models, whose transformers are DINOv2's.

Shape letters: B batch, C latent channels, L latent tokens, N patches, D width, S image size, P patch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder, LatentShape, Posterior
from sendvae_fast.models.positions import turn_pairs
from sendvae_fast.models.transformer import Attention, LayerNorm, Mlp, PatchEmbed


@dataclass(kw_only=True)
class MAETokConfig:
    """Sizes of a `MAETok`. The defaults are MAETok-B-128's. Raises `UserError` for sizes that do not fit together."""

    image_size: int = 256
    """Side of the pictures in pixels; the network takes no other."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    num_latent_tokens: int = 128
    """Tokens of a latent."""
    latent_channels: int = 32
    """Channels of a latent token."""
    encoder_width: int = 768
    """Width of the encoder."""
    encoder_depth: int = 12
    """Transformer blocks of the encoder."""
    encoder_heads: int = 12
    """Attention heads of the encoder."""
    decoder_width: int = 768
    """Width of the decoder."""
    decoder_depth: int = 12
    """Transformer blocks of the decoder."""
    decoder_heads: int = 12
    """Attention heads of the decoder."""
    rope: bool = True
    """Rotary positions of patches, in both transformers. The decoder then has no others; without them it has learned
    ones, as the encoder has in any case."""
    decoder_class_token: bool = False
    """Whether the decoder has a class token before its patches, as the encoder has."""

    def __post_init__(self) -> None:
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            checks.at_least(1, self, *(f"{part}_{size}" for size in ("width", "depth", "heads")), where="MAETok")
            checks.in_interval("[1, 1000]", self, f"{part}_depth", where="MAETok")
            if width % (2 * heads):
                raise UserError(f"MAETok.{part}_width={width} must be a multiple of twice {part}_heads={heads}")
        checks.at_least(
            1, self, "image_size", "patch_size", "num_latent_tokens", "latent_channels", where="MAETok"
        )  # fmt: skip
        if self.image_size % self.patch_size:
            raise UserError(f"MAETok.image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if not self.rope and not self.decoder_class_token:
            raise UserError("MAETok's learned positions begin with the class token's: set decoder_class_token, or rope")

    @property
    def grid_size(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


class MAETok(ImageAutoencoder):
    """Pictures of one size to latents [B, C, 1, L], and back."""

    def __init__(self, config: MAETokConfig):
        super().__init__()
        self.config: MAETokConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Linear(config.encoder_width, config.latent_channels)
        self.post_quant_conv = nn.Linear(config.latent_channels, config.decoder_width)

    def latent_shape(self, image_size: int) -> LatentShape:
        """As in `ImageAutoencoder`."""
        self._check_size(image_size, image_size)
        return self.config.latent_channels, 1, self.config.num_latent_tokens

    def image_size(self, latent_shape: LatentShape) -> int:
        """As in `ImageAutoencoder`."""
        own = self.latent_shape(self.config.image_size)
        if latent_shape != own:
            raise UserError(
                f"latents of {' x '.join(map(str, latent_shape))} are not this MAETok's, which are "
                f"{' x '.join(map(str, own))}: give the autoencoder that made them"
            )
        return self.config.image_size

    def posterior(self, x: Tensor) -> Posterior:
        """As in `ImageAutoencoder`; nothing is drawn, the standard deviation is 0."""
        self._check_size(*x.shape[-2:])
        latent = self.quant_conv(self.encoder(x))  # [B, L, C]
        return Posterior.of_latent(latent.transpose(1, 2).unsqueeze(2))

    def decode(self, z: Tensor) -> Tensor:
        """As in `ImageAutoencoder`."""
        return self.decoder(self.post_quant_conv(z.squeeze(2).transpose(1, 2)))

    def _check_size(self, height: int, width: int) -> None:
        size = self.config.image_size
        if (height, width) != (size, size):
            raise UserError(
                f"this MAETok takes pictures of {size} x {size} pixels and no other, not {height} x {width}: "
                f"choose an image size of {size}"
            )


class Encoder(nn.Module):
    """Pictures [B, 3, S, S] to latent tokens [B, L, D]."""

    def __init__(self, config: MAETokConfig):
        super().__init__()
        width = config.encoder_width
        self.model = Transformer(
            width, config.encoder_depth, config.encoder_heads, config.grid_size,
            has_class_token=True, has_positions=True,
        )  # fmt: skip
        self.model.patch_embed = PatchEmbed(config.patch_size, 3, width)
        self.latent_tokens = _learned(config.num_latent_tokens, width)
        self.latent_pos_embed = _learned(config.num_latent_tokens, width)
        self.freqs = _frequencies(config.encoder_depth, width) if config.rope else None

    def forward(self, x: Tensor) -> Tensor:
        latent = (self.latent_tokens + self.latent_pos_embed).expand(len(x), -1, -1)
        return self.model(self.model.patch_embed(x), latent, self.freqs)[1]


class Decoder(nn.Module):
    """Latent tokens of the decoder's width [B, L, D] to pictures [B, 3, S, S]."""

    def __init__(self, config: MAETokConfig):
        super().__init__()
        width = config.decoder_width
        self.model = Transformer(
            width, config.decoder_depth, config.decoder_heads, config.grid_size,
            has_class_token=config.decoder_class_token, has_positions=not config.rope,
        )  # fmt: skip
        self.mask_token = _learned(1, width)
        self.latent_pos_embed = _learned(config.num_latent_tokens, width)
        self.freqs = _frequencies(config.decoder_depth, width) if config.rope else None
        self.to_pixel = Pixels(width, config.patch_size, config.grid_size)

    def forward(self, z: Tensor) -> Tensor:
        patches = self.mask_token.expand(len(z), self.model.grid_size**2, -1)
        return self.to_pixel(self.model(patches, z + self.latent_pos_embed, self.freqs)[0])


class Transformer(nn.Module):
    """A vision transformer whose sequence is a class token, patches and latent tokens.

    The encoder adds ``patch_embed``, so that the state dict has the published names.
    """

    patch_embed: PatchEmbed

    def __init__(
        self, width: int, depth: int, num_heads: int, grid_size: int, *, has_class_token: bool, has_positions: bool
    ):
        super().__init__()
        self.num_heads, self.grid_size = num_heads, grid_size
        self.cls_token = _learned(1, width) if has_class_token else None
        self.pos_embed = _learned(1 + grid_size**2, width) if has_positions else None
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = LayerNorm(width, eps=1e-6)

    def forward(self, patches: Tensor, latent: Tensor, frequencies: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the blocks and the norm.

        Args:
            patches: [B, N, D] in row-major order.
            latent: [B, L, D], with their positions.
            frequencies: of the rotary positions, [2, depth, D / 2] (see `rotations`), or None.

        Returns:
            patches and latent tokens after the norm, like what was given.
        """
        x = patches
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        before, after = x.shape[1] - patches.shape[1], latent.shape[1]
        x = torch.cat([x, latent], dim=1)
        for index, block in enumerate(self.blocks):
            rope = None
            if frequencies is not None:
                rope = rotations(frequencies[:, index], self.num_heads, self.grid_size, before, after)
            x = block(x, rope)
        x = self.norm(x)
        return x[:, before:-after], x[:, -after:]


class Block(nn.Module):
    """A layer of DINOv2: [B, N, D] to the same; each branch has a factor per channel."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.mlp = Mlp(width, approximate="none")
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x: Tensor, rope: Callable[[Tensor], Tensor] | None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class LayerScale(nn.Module):
    """A learned factor per channel, [..., D] to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Pixels(nn.Module):
    """Patches [B, N, D] to pictures [B, 3, S, S] by a linear layer, whose outputs are by row, column, then colour."""

    def __init__(self, width: int, patch_size: int, grid_size: int):
        super().__init__()
        self.patch_size, self.grid_size = patch_size, grid_size
        self.model = nn.Linear(width, 3 * patch_size**2)

    def forward(self, patches: Tensor) -> Tensor:
        grid, patch = self.grid_size, self.patch_size
        x = self.model(patches).unflatten(2, (patch, patch, 3)).unflatten(1, (grid, grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def rotations(
    frequencies: Tensor, num_heads: int, grid_size: int, before: int, after: int
) -> Callable[[Tensor], Tensor]:
    """Rotary positions of a layer's queries or keys [B, heads, before + N + after, D / heads] (Heo et al., 2024).

    Elements 2i and 2i + 1 of a head's patch are turned by ``column f_x + row f_y``; other tokens stay as they are.

    Args:
        frequencies: f_x, then f_y, of every pair of every head, [2, D / 2].
        num_heads: of the layer.
        grid_size: patches per side.
        before: tokens before the patches.
        after: tokens behind them.
    """
    of_column, of_row = frequencies.unflatten(1, (num_heads, 1, -1))  # [heads, 1, D / heads / 2]
    places = torch.arange(grid_size**2, device=frequencies.device)
    column, row = (place.to(frequencies.dtype).unsqueeze(1) for place in (places % grid_size, places // grid_size))
    angles = F.pad(column * of_column + row * of_row, (0, 0, before, after))  # [heads, tokens, D / heads / 2]
    cos, sin = angles.cos(), angles.sin()
    return lambda x: turn_pairs(x, cos, sin)


def _learned(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, count, width) * 0.02)


def _frequencies(depth: int, width: int) -> nn.Parameter:
    """Of `rotations`, a layer after the other; for random weights alone, drawn up to a turn in so many patches."""
    return nn.Parameter(torch.randn(2, depth, width // 2) * (2 * math.pi / 16))
