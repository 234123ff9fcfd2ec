"""SiT, the flow transformer of stage 2, with the REPA projector.

The network of REPA and REPA-E (SiT without learned sigma) with their state-dict layout. It predicts the velocity
``v = ε - z`` at ``z_t = (1 - t) z + t ε``; `t` is the noise level in [0, 1] and is embedded as it is, not times 1000.

Shape letters: B batch, C latent channels, H latent size, P patch size, N tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.positions import sincos_2d
from sendvae_fast.models.transformer import Attention, Mlp, PatchEmbed, init_transformer, projector
from sendvae_fast.ops import adaln

_SIZES = {
    "S": dict(depth=12, width=384, num_heads=6),
    "B": dict(depth=12, width=768, num_heads=12),
    "L": dict(depth=24, width=1024, num_heads=16),
    "XL": dict(depth=28, width=1152, num_heads=16),
}
_PATCH_SIZES = (1, 2, 4, 8)
_FREQUENCIES = 256  # width of the sinusoid that embeds t


@dataclass(kw_only=True)
class SiTConfig:
    """Sizes of a `SiT`. Raises `UserError` for sizes that do not fit together."""

    latent_size: int
    """Height and width of the latent."""
    latent_channels: int
    """Channels of the latent."""
    patch_size: int
    """Latent positions per token and side: 1 for f16 latents, 2 for f8."""
    width: int
    """Width of the transformer."""
    depth: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads."""
    num_classes: int
    """Classes of the data; index `num_classes` is the null class of classifier-free guidance."""
    label_dropout: float = 0.1
    """Share of labels that training replaces by the null class. Drawn by the caller, not by the network."""
    repa_dim: int | None = None
    """Width of the foundation model's features; without it the network has no REPA projector."""
    repa_block: int = 8
    """The projector reads the tokens after this many blocks."""
    projector_width: int = 2048
    """Hidden width of the REPA projector."""

    def __post_init__(self):
        for name in ("latent_size", "latent_channels", "patch_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise UserError(f"SiT {name} is {getattr(self, name)}: it must be at least 1")
        if self.latent_size % self.patch_size:
            raise UserError(f"SiT latent_size={self.latent_size} must be a multiple of patch_size={self.patch_size}")
        if self.width < 4 or self.width % 4 or self.width % self.num_heads:
            raise UserError(
                f"SiT width={self.width} must be a multiple of 4 (sine-cosine positions) and of "
                f"num_heads={self.num_heads}"
            )
        if not 0.0 <= self.label_dropout < 1.0:
            raise UserError(f"SiT label_dropout is {self.label_dropout}: it must be in [0, 1)")
        if self.repa_dim is not None and not 1 <= self.repa_block <= self.depth:
            raise UserError(
                f"SiT repa_block={self.repa_block} must be between 1 and depth={self.depth}: the projector reads the "
                "tokens after that block"
            )

    @classmethod
    def preset(cls, name: str, **sizes) -> SiTConfig:
        """A published size by name, ``SiT-{S,B,L,XL}/{1,2,4,8}``; `sizes` gives the other fields.

        >>> SiTConfig.preset("SiT-XL/1", latent_size=16, latent_channels=32, num_classes=1000, repa_dim=768)
        """
        presets = {f"SiT-{size}/{patch}": (size, patch) for size in _SIZES for patch in _PATCH_SIZES}
        if name not in presets:
            raise UserError(f"unknown SiT preset {name!r}: choose one of {', '.join(presets)}")
        size, patch_size = presets[name]
        return cls(patch_size=patch_size, **_SIZES[size], **sizes)

    @property
    def grid_size(self) -> int:
        """Tokens per side."""
        return self.latent_size // self.patch_size


class SiT(nn.Module):
    """Velocity of noised latents, conditioned on noise level and class."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.patch_size, config.latent_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        # Never trained, but part of the published layout; see `_fill_pos_embed`.
        self.register_buffer("pos_embed", sincos_2d(width, config.grid_size).unsqueeze(0))  # [1, N, D]
        self.blocks = nn.ModuleList(SiTBlock(width, config.num_heads) for _ in range(config.depth))
        if config.repa_dim is not None:
            # A list, because REPA allows several foundation models.
            self.projectors = nn.ModuleList([projector(width, config.projector_width, config.repa_dim)])
        self.final_layer = FinalLayer(width, config.patch_size, config.latent_channels)
        self._initialise()
        self.register_load_state_dict_pre_hook(_fill_pos_embed)

    def _initialise(self) -> None:
        init_transformer(self)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # Zero: every block starts as the identity and the predicted velocity as zero (adaLN-Zero).
        zero_layers = [block.adaLN_modulation[1] for block in self.blocks]
        zero_layers += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, z_t: Tensor, t: Tensor, labels: Tensor, drop: Tensor | None = None, *, return_features: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the velocity.

        Args:
            z_t: noised latents [B, C, H, H], or their flattened patches [B, N, C P P] (see `PatchEmbed`).
            t: noise levels [B] in [0, 1].
            labels: classes int64 [B] in [0, num_classes]; num_classes is the null class.
            drop: bool [B], which labels become the null class; none when not given.
            return_features: also run the REPA projector (needs `repa_dim`). Sampling leaves it off.

        Returns:
            velocity [B, C, H, H] and, with `return_features`, the projected tokens [B, N, repa_dim] (else None).
        """
        config = self.config
        expected = (config.latent_channels, config.latent_size, config.latent_size)
        if z_t.dim() == 3:
            expected = (config.grid_size**2, config.latent_channels * config.patch_size**2)
        if z_t.shape[1:] != expected:
            raise UserError(
                f"SiT was built for latents of {' x '.join(map(str, expected))} but got "
                f"{' x '.join(map(str, z_t.shape[1:]))}: match latent_channels and latent_size to the data"
            )
        if return_features and config.repa_dim is None:
            raise ValueError("return_features needs a SiT with repa_dim")
        x = self.x_embedder(z_t)
        stream = Stream(x + self.pos_embed.to(x.dtype))
        condition = self.t_embedder(t) + self.y_embedder(labels, drop)  # [B, D]
        features = None
        for i, block in enumerate(self.blocks, start=1):
            stream = block(stream, condition)
            if return_features and i == config.repa_block:
                features = self.projectors[0](stream.tokens())
        return self._unpatchify(self.final_layer(stream, condition)), features

    def _unpatchify(self, x: Tensor) -> Tensor:
        """Tokens [B, N, P P C] to latents [B, C, H, H]."""
        grid, patch = self.config.grid_size, self.config.patch_size
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))  # [B, row, column, P, P, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimestepEmbedder(nn.Module):
    """Noise levels [B] to [B, D]: a sinusoid (cosines, then sines) and a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = _FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        # In fp32 whatever the network's precision.
        angles = t.float().unsqueeze(1) * torch.exp(-math.log(10000.0) / half * steps)  # [B, half]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Classes [B] to [B, D]; the last row of the table is the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.null_class = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor, drop: Tensor | None) -> Tensor:
        if drop is not None:
            labels = labels.masked_fill(drop, self.null_class)
        return self.embedding_table(labels)


class Stream(NamedTuple):
    """The residual stream between two layers. What the last layer gave is added in the op of the next norm, `adaln`."""

    x: Tensor
    """Tokens [B, N, D] before the last layer."""
    branch: Tensor | None = None
    """What the last layer gave [B, N, D]; None before the first layer."""
    gate: Tensor | None = None
    """Its factor [B, D]."""

    def tokens(self) -> Tensor:
        """The tokens [B, N, D] with everything added."""
        return self.x if self.branch is None else self.x + self.gate.unsqueeze(1) * self.branch


class SiTBlock(nn.Module):
    """Transformer layer on a stream of [B, N, D], whose norms and branches are modulated by the condition [B, D]."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = Mlp(width, approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, stream: Stream, condition: Tensor) -> Stream:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        y, x = adaln(stream.x, shift1, scale1, branch=stream.branch, gate=stream.gate)
        y, x = adaln(x, shift2, scale2, branch=self.attn(y), gate=gate1)
        return Stream(x, self.mlp(y), gate2)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer from a stream of [B, N, D] to patches [B, N, P P C]."""

    def __init__(self, width: int, patch_size: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, stream: Stream, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        y, _ = adaln(stream.x, shift, scale, branch=stream.branch, gate=stream.gate)
        return self.linear(y)


def _fill_pos_embed(module: SiT, state_dict: dict, prefix: str, *_) -> None:
    """Weights collected by parameter name (an EMA, for one) lack this constant buffer: take the module's own."""
    state_dict.setdefault(prefix + "pos_embed", module.pos_embed)
