"""The LDM convolutional autoencoder (CompVis latent-diffusion, VQGAN family) that Send-VAE fine-tunes.

Architecture and state-dict layout follow latent-diffusion's ``AutoencoderKL``, so that published weights in that layout
(SD-VAE, VA-VAE, IN-VAE, E2E-VAE) load key for key. Images are in [-1, 1].

Shape letters: B batch, C latent channels, H W spatial size, D feature channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder, LatentShape, Posterior
from sendvae_fast.models.norms import GroupNormSiLU
from sendvae_fast.models.precision import no_autocast
from sendvae_fast.ops import attention


class Autoencoder(ImageAutoencoder):
    """Encoder to Gaussian moments and decoder back to images.

    The image size must be a multiple of `downsampling`; other sizes than the configuration's nominal one are fine.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config: AutoencoderConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.apply(_initialise)

    @property
    def downsampling(self) -> int:
        """Image size over latent size."""
        return self.config.downsampling

    def latent_shape(self, image_size: int) -> LatentShape:
        """As in `ImageAutoencoder`."""
        self._check_size(image_size, image_size)
        side = image_size // self.downsampling
        return self.config.latent_channels, side, side

    def image_size(self, latent_shape: LatentShape) -> int:
        """As in `ImageAutoencoder`."""
        channels, height, width = latent_shape
        if channels != self.config.latent_channels or height != width:
            raise UserError(
                f"latents of {channels} x {height} x {width} are not this autoencoder's, which have "
                f"{self.config.latent_channels} channels and are square: give the autoencoder that made them"
            )
        return height * self.downsampling

    def posterior(self, x: Tensor) -> Posterior:
        """As in `ImageAutoencoder`; pictures may be oblong."""
        return Posterior.from_moments(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H f, W f] in [-1, 1] to moments [B, 2C, H, W] (mean, then log-variance; see `Posterior`)."""
        self._check_size(x.shape[-2], x.shape[-1])
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, H, W] to images [B, 3, H f, W f], near [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def _check_size(self, height: int, width: int) -> None:
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"image of {height} x {width} pixels cannot be encoded {self.downsampling} times smaller: "
                f"choose an image size that is a multiple of {self.downsampling}"
            )


Sum = tuple[Tensor, Tensor | None]
"""Two maps [B, D, H, W] that stand for their sum (None for 0). Blocks pass it on as such: the norm of the next block
forms the sum in a pass that it makes anyway."""


def formed(h: Sum) -> Tensor:
    """The sum itself, where no norm comes next."""
    branch, shortcut = h
    return branch if shortcut is None else branch + shortcut


class SumNorm(GroupNormSiLU):
    """GroupNorm of a `Sum`, then SiLU unless told otherwise: (its output, the sum), both channels-last."""

    def __init__(self, config: AutoencoderConfig, width: int, silu: bool = True):
        super().__init__(config.num_groups, width, eps=1e-6, silu=silu)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out = super().forward(x, residual)
        return (out, x) if residual is None else out  # pyright: ignore[reportReturnType] - a pair with a residual


class Encoder(nn.Module):
    """Images [B, 3, H f, W f] to features [B, 2C, H, W]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.base_channels
        for level, level_width in enumerate(config.widths):
            stage = Level(config, level, width, config.num_res_blocks)
            stage.downsample = Downsample(level_width) if level < config.num_levels - 1 else nn.Identity()
            self.down.append(stage)
            width = level_width
        self.mid = Middle(config, width)
        self.norm_out = SumNorm(config, width)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Sum = (self.conv_in(x), None)
        for stage in self.down:
            h = stage.downsample(stage(h))  # pyright: ignore[reportCallIssue] - a Level
        out, _ = self.norm_out(*self.mid(h))
        return self.conv_out(out)


class Decoder(nn.Module):
    """Latents [B, C, H, W] to images [B, 3, H f, W f]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        width = config.widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = Middle(config, width)
        stages = []
        for level in reversed(range(config.num_levels)):
            stage = Level(config, level, width, config.num_res_blocks + 1)
            width = config.widths[level]
            stage.upsample = Upsample(width) if level > 0 else nn.Identity()
            stages.append(stage)
        # Stored with the highest resolution first, as latent-diffusion does; run from the last to the first.
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = SumNorm(config, width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid((self.conv_in(z), None))
        for stage in reversed(self.up):
            h = stage.upsample(stage(h))  # pyright: ignore[reportCallIssue] - a Level
        out, _ = self.norm_out(*h)
        return self.conv_out(out)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the configuration says so.

    The owner adds ``downsample`` or ``upsample``, so that the state dict has latent-diffusion's names.
    """

    def __init__(self, config: AutoencoderConfig, level: int, in_width: int, num_blocks: int):
        super().__init__()
        width = config.widths[level]
        self.block = nn.ModuleList(ResnetBlock(config, in_width if i == 0 else width, width) for i in range(num_blocks))
        num_attention = num_blocks if config.has_attention(level) else 0
        self.attn = nn.ModuleList(AttentionBlock(config, width) for _ in range(num_attention))

    def forward(self, h: Sum) -> Sum:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution: [B, D, H, W] to the same."""

    def __init__(self, config: AutoencoderConfig, width: int):
        super().__init__()
        self.block_1 = ResnetBlock(config, width, width)
        self.attn_1 = AttentionBlock(config, width) if config.mid_attention else nn.Identity()
        self.block_2 = ResnetBlock(config, width, width)

    def forward(self, h: Sum) -> Sum:
        return self.block_2(self.attn_1(self.block_1(h)))


class ResnetBlock(nn.Module):
    """norm, swish, conv, norm, swish, conv, plus the input (through a 1x1 convolution where the width changes).

    This last sum, like its input, is a `Sum`.
    """

    compiles = recomputes = True  # see `engine.blocks`

    def __init__(self, config: AutoencoderConfig, in_width: int, out_width: int):
        super().__init__()
        self.norm1 = SumNorm(config, in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.norm2 = SumNorm(config, out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()

    def forward(self, x: Sum) -> Sum:
        h, s = self.norm1(*x)
        h, _ = self.norm2(self.conv1(h))
        return self.conv2(h), self.nin_shortcut(s)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the H x W positions of [B, D, H, W], plus the input."""

    compiles = recomputes = True  # see `engine.blocks`

    def __init__(self, config: AutoencoderConfig, width: int):
        super().__init__()
        self.norm = SumNorm(config, width, silu=False)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Sum) -> Sum:
        h, s = self.norm(*x)
        # [B, D, H, W] -> [B, 1 head, H W, D]; a view when x is channels-last.
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, s.shape[-2:])
        return self.proj_out(h), s


class Downsample(nn.Module):
    """Stride-2 convolution, padded with one zero row below and one zero column at the right only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, h: Sum) -> Sum:
        return self.conv(F.pad(formed(h), (0, 1, 0, 1))), None


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Sum) -> Sum:
        x = formed(h)
        with no_autocast(x):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x), None


def _initialise(module: nn.Module) -> None:
    """He's normal initialisation of convolutions; matters only for training from scratch.

    PyTorch's default, which latent-diffusion keeps, is sqrt(6) times smaller: with it the demo's autoencoder takes
    more than twice as many steps to the same error.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
