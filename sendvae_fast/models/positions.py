"""Position embeddings that are not learned: sine-cosine, added to tokens, and rotary, for queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sincos_2d(width: int, grid_size: int) -> Tensor:
    """The two-dimensional embedding of MAE (He et al., 2022), float32 [grid_size ** 2, width] in row-major order.

    The first half of the width encodes the column, the second half the row; each is ``sin(p w)`` then ``cos(p w)`` with
    ``w_i = 10000^(-i / (width / 4))``. Computed in float64. `width` must be a multiple of 4 (ValueError).
    """
    rows, columns = _angles(width, grid_size)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1).float()


def sincos_1d(width: int, length: int) -> Tensor:
    """The embedding of "Attention is all you need" (Vaswani et al., 2017), float32 [length, width].

    Element 2i is ``sin(p w_i)`` and 2i + 1 is ``cos(p w_i)``, with ``w_i = 10000^(-2 i / width)``. Computed in float64.
    `width` must be even (ValueError).
    """
    angles = rotary_angles_1d(width, length)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def rotary_angles_2d(head_dim: int, grid_size: int) -> Tensor:
    """Angles of `RotaryEmbedding` for a grid, in the layout of EVA-02 and LightningDiT: float64 [N, head_dim / 2].

    The first half of the pairs has the token's row as p, the others its column, with ``w_i = 10000^(-i / (d / 4))`` in
    each half. `head_dim` must be a multiple of 4 (ValueError).
    """
    return torch.cat(_angles(head_dim, grid_size), dim=1)


def rotary_angles_1d(head_dim: int, length: int) -> Tensor:
    """Angles of `RotaryEmbedding` for a sequence (Su et al., 2021): float64 [length, head_dim / 2].

    ``w_i = 10000^(-i / (d / 2))``. `head_dim` must be even (ValueError).
    """
    if head_dim % 2:
        raise ValueError(f"width must be even, got {head_dim}")
    half = head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequencies


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al., 2021): elements 2i and 2i + 1 of a head are a pair, turned by the angle ``p w_i``.

    angles: of every token and pair, [N, d / 2], from `rotary_angles_1d` or `rotary_angles_2d`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, angles: Tensor):
        super().__init__()
        # A function of the sizes, so they are not saved.
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn x [B, heads, N, head_dim]; computed, and given back, in float32 unless the module was cast."""
        return turn_pairs(x, self.cos, self.sin)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Elements 2i and 2i + 1 of x [..., d] as a pair, turned by the angle of cosine and sine i [..., d / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _angles(width: int, grid_size: int) -> tuple[Tensor, Tensor]:
    """Angles ``p w_i`` of every token's row, and of its column: float64 [grid_size ** 2, width / 4] each."""
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    positions = torch.arange(grid_size, dtype=torch.float64)
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    return rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies
