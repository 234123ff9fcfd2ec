"""Transformer pieces that the mapper and SiT share; parameter names are timm's and DiT's.

Shape letters: B batch, N tokens, D width, C channels, P patch size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sendvae_fast.models.precision import no_autocast
from sendvae_fast.ops import attention


class PatchEmbed(nn.Module):
    """Images or latents [B, C, H, W] to tokens [B, N, D], N = (H / P) (W / P), in row-major order.

    Also takes the flattened patches themselves, [B, N, C P P], as `ops.noise_inject` gives them with a patch size.
    """

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = PatchProjection(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PatchProjection(nn.Conv2d):
    """The convolution of `PatchEmbed`, which on flattened patches is a linear layer.

    A module of its own, because ZeRO-3 gathers a parameter for the forward pass of the module that owns it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return F.linear(x, self.weight.flatten(1), self.bias)
        return super().forward(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] to [B, N, D], with biases.

    `q_norm` and `k_norm` are modules on [..., D / heads], or None; their outputs and `rope`'s are cast to v's dtype.
    """

    def __init__(self, width: int, num_heads: int, q_norm: nn.Module | None = None, k_norm: nn.Module | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        # [B, N, 3 D] -> 3 x [B, heads, N, D / heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear to 4 D, GELU (`approximate` as in `torch.nn.GELU`), linear back: [B, N, D] to [B, N, D]."""

    def __init__(self, width: int, approximate: str):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """silu(a) b with a, b = linear(x), then linear: [B, N, D] to [B, N, D]. As many weights as `Mlp`."""

    def __init__(self, width: int):
        super().__init__()
        # As LightningDiT rounds it, so that its weights fit whatever the width.
        hidden = int(2 / 3 * (4 * width))
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + 1e-6)`` times a weight, [..., D] to [..., D]; in float32 at least, also the result."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(compute), self.weight.shape, self.weight.to(compute), eps=1e-6)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in its input's dtype, under autocast too, which would give float32; sums are float32."""

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def projector(width: int, hidden_width: int, target_dim: int) -> nn.Sequential:
    """REPA's three-layer SiLU MLP [..., width] to [..., target_dim], towards a foundation model's features."""
    return nn.Sequential(
        nn.Linear(width, hidden_width),
        nn.SiLU(),
        nn.Linear(hidden_width, hidden_width),
        nn.SiLU(),
        nn.Linear(hidden_width, target_dim),
    )


def init_transformer(module: nn.Module) -> None:
    """Initialise as MAE, DiT and REPA do: Xavier-uniform linear and patch-embedding weights, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | PatchEmbed):
            layer = part.proj if isinstance(part, PatchEmbed) else part
            # A patch embedding is a linear layer on flattened patches, so it is initialised like one.
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
