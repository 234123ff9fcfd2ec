"""Fixed sine-cosine position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


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
