"""Position embeddings that are not learned: sine-cosine, added to tokens, and rotary, for queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sincos_2d(width: int, grid_size: int) -> Tensor:
    """The two-dimensional embedding of MAE (He et al., 2022), float32 [grid_size ** 2, width] in row-major order.

    The first half of the width encodes the column, the second half the row; each is ``sin(p w)`` then ``cos(p w)`` with
    ``w_i = 10000^(-i / (width / 4))``. Computed in float64. `width` must be a multiple of 4 (ValueError).
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    positions = torch.arange(grid_size, dtype=torch.float64)
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies  # [N, width / 4]
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


class RotaryEmbedding(nn.Module):
    """Two-dimensional rotary positions (Su et al., 2021; the layout is EVA-02's and LightningDiT's).

    Elements 2i and 2i + 1 of a head of width d are a pair, turned by the angle ``p w_i``. The first d / 4 pairs have
    the token's row as p, the others its column, with ``w_i = 10000^(-i / (d / 4))`` in each half. `head_dim` must be a
    multiple of 4 (ValueError).
    """

    def __init__(self, head_dim: int, grid_size: int):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
        positions = torch.arange(grid_size, dtype=torch.float64)
        rows, columns = torch.meshgrid(positions, positions, indexing="ij")
        quarter = head_dim // 4
        frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        angles = torch.cat([part.reshape(-1, 1) * frequencies for part in (rows, columns)], dim=1)  # [N, head_dim / 2]
        # A function of the sizes, so they are not saved.
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn x [B, heads, N, head_dim]; computed, and given back, in float32 unless the module was cast."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1).flatten(-2)
