"""Transformer pieces that the mapper and SiT share; parameter names are timm's and DiT's.

Shape letters: B batch, N tokens, D width, C channels, P patch size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

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
    """Multi-head self-attention [B, N, D] to [B, N, D], with biases and without query-key normalisation."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 D] -> 3 x [B, heads, N, D / heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear to 4 D, GELU (`approximate` as in `torch.nn.GELU`), linear back: [B, N, D] to [B, N, D]."""

    def __init__(self, width: int, approximate: str):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


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
            nn.init.zeros_(layer.bias)
