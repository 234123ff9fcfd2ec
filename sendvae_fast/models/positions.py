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


class RotaryEmbedding(nn.Module):
    """Two-dimensional rotary positions (Su et al., 2021; the layout is EVA-02's and LightningDiT's).

    Elements 2i and 2i + 1 of a head of width d are a pair, turned by the angle ``p w_i``. The first d / 4 pairs have
    the token's row as p, the others its column, with ``w_i = 10000^(-i / (d / 4))`` in each half. `head_dim` must be a
    multiple of 4 (ValueError).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, grid_size: int):
        super().__init__()
        angles = torch.cat(_angles(head_dim, grid_size), dim=1)  # [N, head_dim / 2]
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
