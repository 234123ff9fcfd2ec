"""SiT, the flow transformer of stage 2, with the REPA projector.

The network of REPA and REPA-E (SiT without learned sigma) with their state-dict layout, and by its switches that of
LightningDiT (Yao et al., 2025) with its parameter names, or DiT (Peebles & Xie, 2023). It predicts the velocity
``v = ε - z`` at ``z_t = (1 - t) z + t ε``; `t` is the noise level in [0, 1] and is embedded as it is, not times 1000. A
DiT predicts the noise and its variance at step t of 0 .. 999, see `models.diffusion`.

Latents are square, or one row: a sequence of tokens, such as MAETok's, whose positions are those along it.

Shape letters: B batch, C latent channels, H W latent size, P patch size, N tokens, D width.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.norms import AdaLayerNorm, AdaRMSNorm
from sendvae_fast.models.positions import (
    RotaryEmbedding,
    rotary_angles_1d,
    rotary_angles_2d,
    sincos_1d,
    sincos_2d,
)
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.models.transformer import (
    Attention,
    Mlp,
    PatchEmbed,
    RMSNorm,
    SwiGLU,
    init_transformer,
    projector,
)

FREQUENCIES = 256
"""Width of the sinusoid that embeds t: cosines, then sines."""


class SiT(nn.Module):
    """Velocity of noised latents, conditioned on noise level and class."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.patch_size, config.latent_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        size, is_sequence = config.grid_shape[1], config.one_dimensional
        positions = sincos_1d(width, size) if is_sequence else sincos_2d(width, size)
        # Seldom trained, but part of the published layout in any case; see `_fill_pos_embed`.
        self.pos_embed: Tensor  # [1, N, D]
        if config.trained_positions:
            self.pos_embed = nn.Parameter(positions.unsqueeze(0))
        else:
            self.register_buffer("pos_embed", positions.unsqueeze(0))
        self.rope = None
        if config.rope:
            angles_of = rotary_angles_1d if is_sequence else rotary_angles_2d
            self.rope = RotaryEmbedding(angles_of(config.head_dim, size))
        self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(config.depth))
        if config.repa_dim is not None:
            # A list, because REPA allows several foundation models.
            self.projectors = nn.ModuleList([projector(width, config.projector_width, config.repa_dim)])
        self.final_layer = FinalLayer(config)
        self._initialise()
        self.register_load_state_dict_pre_hook(_fill_pos_embed)

    def _initialise(self) -> None:
        init_transformer(self)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        mlp: Any = self.t_embedder.mlp
        nn.init.normal_(mlp[0].weight, std=0.02)
        nn.init.normal_(mlp[2].weight, std=0.02)
        # Zero: every block starts as the identity and the predicted velocity as zero (adaLN-Zero).
        blocks: Any = self.blocks
        zero_layers: list[Any] = [block.adaLN_modulation[1] for block in blocks]
        zero_layers += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, z_t: Tensor, t: Tensor, labels: Tensor, drop: Tensor | None = None, *, return_features: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the velocity.

        Args:
            z_t: noised latents [B, C, H, W], or their flattened patches [B, N, C P P] (see `PatchEmbed`).
            t: noise levels [B] in [0, 1], or a DiT's steps.
            labels: classes int64 [B] in [0, num_classes]; num_classes is the null class.
            drop: bool [B], which labels become the null class; none when not given.
            return_features: also run the REPA projector (needs `repa_dim`). Sampling leaves it off.

        Returns:
            velocity [B, C, H, W], or of a DiT the noise and then what its variance is made of [B, 2C, H, W]; and, with
            `return_features`, the projected tokens [B, N, repa_dim] (else None).
        """
        config = self.config
        expected = config.latent_shape
        if z_t.dim() == 3:
            expected = (config.num_tokens, config.latent_channels * config.patch_size**2)
        if z_t.shape[1:] != expected:
            raise UserError(
                f"SiT was built for latents of {' x '.join(map(str, expected))} but got "
                f"{' x '.join(map(str, z_t.shape[1:]))}: match latent_channels and latent_size to the data"
            )
        stream, condition = self._embed(z_t, t, labels, drop)
        features, done = None, 0
        if return_features:
            stream, features = self._project(stream, condition)
            done = config.repa_block
        for block in islice(self.blocks, done, None):
            stream = block(stream, condition, self.rope)
        return self._unpatchify(self.final_layer(stream, condition)), features

    def project(self, z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The projected tokens of `forward` alone, [B, N, repa_dim]; blocks after `repa_block` do not run."""
        return self._project(*self._embed(z_t, t, labels, None))[1]

    def _embed(self, z_t: Tensor, t: Tensor, labels: Tensor, drop: Tensor | None) -> tuple[Stream, Tensor]:
        """The first block's input and the condition [B, D] of every block."""
        x = self.x_embedder(z_t)
        return Stream(x + self.pos_embed.to(x.dtype)), self.t_embedder(t) + self.y_embedder(labels, drop)

    def _project(self, stream: Stream, condition: Tensor) -> tuple[Stream, Tensor]:
        """Run the blocks up to `repa_block`, and the projector on their tokens."""
        if self.config.repa_dim is None:
            raise ValueError("features need a SiT with repa_dim")
        for block in islice(self.blocks, self.config.repa_block):
            stream = block(stream, condition, self.rope)
        return stream, self.projectors[0](stream.tokens())

    def _unpatchify(self, x: Tensor) -> Tensor:
        """Tokens [B, N, P P C] to latents [B, C, H, W]."""
        patch = self.config.patch_size
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, self.config.grid_shape)  # [B, row, column, P, P, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimestepEmbedder(nn.Module):
    """Noise levels [B] to [B, D]: a sinusoid (cosines, then sines) and a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp: Any = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # In fp32 whatever the network's precision.
        angles = t.float().unsqueeze(1) * timestep_frequencies(t.device)  # [B, FREQUENCIES / 2]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


def timestep_frequencies(device: torch.device | str = "cpu") -> Tensor:
    """The angular frequencies at which `t` is embedded, float32 [FREQUENCIES / 2]."""
    half = FREQUENCIES // 2
    return torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=device))


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
    """The residual stream between two layers. The last layer's output is added by the op of the next norm, `adaln`."""

    x: Tensor
    """Tokens [B, N, D] before the last layer."""
    branch: Tensor | None = None
    """The last layer's output [B, N, D]; None before the first layer."""
    gate: Tensor | None = None
    """Its factor [B, D]."""

    def tokens(self) -> Tensor:
        """The tokens [B, N, D] with everything added."""
        return self.x if self.branch is None or self.gate is None else self.x + self.gate.unsqueeze(1) * self.branch


def _norm(config: SiTConfig) -> nn.Module:
    return AdaRMSNorm(config.width) if config.rms_norm else AdaLayerNorm()


def _qk_norm(config: SiTConfig) -> nn.Module | None:
    if not config.qk_norm:
        return None
    return RMSNorm(config.head_dim) if config.rms_norm else nn.LayerNorm(config.head_dim)


class SiTBlock(nn.Module):
    """Transformer layer on a stream of [B, N, D], whose norms and branches are modulated by the condition [B, D]."""

    compiles = recomputes = True  # see `engine.blocks`

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = Attention(config.width, config.num_heads, q_norm=_qk_norm(config), k_norm=_qk_norm(config))
        self.mlp = SwiGLU(config.width) if config.swiglu else Mlp(config.width, approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, stream: Stream, condition: Tensor, rope: RotaryEmbedding | None = None) -> Stream:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        y, x = self.norm1(stream.x, shift1, scale1, stream.branch, stream.gate)
        y, x = self.norm2(x, shift2, scale2, self.attn(y, rope), gate1)
        return Stream(x, self.mlp(y), gate2)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer from a stream of [B, N, D] to patches [B, N, P P C], or P P 2C of a DiT."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.norm_final = _norm(config)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, stream: Stream, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        y, _ = self.norm_final(stream.x, shift, scale, stream.branch, stream.gate)
        return self.linear(y)


def _fill_pos_embed(module: SiT, state_dict: dict, prefix: str, *_) -> None:
    """Weights collected by parameter name (an EMA, for one) lack this buffer where it is one: take the module's own."""
    state_dict.setdefault(prefix + "pos_embed", module.pos_embed)
