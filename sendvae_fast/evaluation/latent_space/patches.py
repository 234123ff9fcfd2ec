"""How alike the patches of a picture are in its latent: maps of a chosen patch as in ReaLS' Fig. 1b, and a number.

The similarity of two patches is the cosine of the latent's channels, normalised by their statistics, at their
positions. How far the similarities in a picture are in the order of those of a foundation model's patch tokens is
Spearman's correlation over the pairs of different patches.

Shape letters: n pictures, C channels, N patches, S picture size, G side of a grid.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COLOUR_MAP = "viridis"
LEAST_TILE_PX = 128
"""Side that maps and their pictures are enlarged to at least."""
MARK = (255, 60, 60)
NUM_CELLS = 8
"""Cells along a side of which one is chosen."""
LEAST_PATCHES = 3
"""Patches below which there is no order of pairs to compare."""


def similarities(cells: Tensor) -> Tensor:
    """Cosines of all pairs of positions [n, N, N] of [n, C, H, W], N = H W in rows; 0 beside a vector of zeros."""
    vectors = F.normalize(cells.flatten(2), dim=1)
    return vectors.transpose(1, 2) @ vectors


def agreement(ours: Tensor, theirs: Tensor) -> Tensor:
    """Spearman's correlation of the similarities of different patches, picture by picture: float64 [n].

    Of two grids the finer is averaged onto the coarser. 0 where all pairs of one side are alike.

    Args:
        ours: [n, C, H, W].
        theirs: [n, D, G, G] of the same pictures.
    """
    from scipy.stats import rankdata

    height, width = (min(sides) for sides in zip(ours.shape[2:], theirs.shape[2:], strict=True))
    above = np.triu_indices(height * width, k=1)
    found = []
    for pair in zip(ours.split(1), theirs.split(1), strict=True):  # one at a time: N^2 numbers each
        both = [similarities(F.adaptive_avg_pool2d(cells.double(), (height, width)))[0].numpy() for cells in pair]
        a, b = (ranks - ranks.mean() for ranks in (rankdata(matrix[above]) for matrix in both))
        length = np.sqrt((a @ a) * (b @ b))
        found.append(float(a @ b / length) if length > 0 else 0.0)
    return torch.tensor(found, dtype=torch.float64)


def chosen_points(images: Tensor) -> Tensor:
    """A place in each picture to look from, the same for every autoencoder: float64 [n, 2], row and column in 0 to 1.

    The middle of that of `NUM_CELLS` x `NUM_CELLS` cells whose mean colour is farthest from the picture's.

    Args:
        images: uint8 [n, 3, S, S].
    """
    cells = F.adaptive_avg_pool2d(images.double(), NUM_CELLS)
    distance = (cells - cells.mean(dim=(2, 3), keepdim=True)).square().sum(dim=1)
    best = distance.flatten(1).argmax(dim=1)
    return (torch.stack([best // NUM_CELLS, best % NUM_CELLS], dim=1) + 0.5) / NUM_CELLS


def cell_at(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [n] each, of the cells of a grid that points [n, 2] lie in."""
    sides = torch.tensor([height, width], dtype=points.dtype)
    rows, columns = (points * sides).floor().long().unbind(dim=1)
    return rows, columns


def maps_of(cells: Tensor, points: Tensor) -> Tensor:
    """Cosines of the cell that a point lies in with all cells: [n, H, W] of cells [n, C, H, W] and points [n, 2]."""
    rows, columns = cell_at(points, *cells.shape[2:])
    chosen = F.normalize(cells[torch.arange(len(cells)), :, rows, columns], dim=1)
    return torch.einsum("nc,nchw->nhw", chosen, F.normalize(cells, dim=1))


def drawn_maps(maps: Tensor, points: Tensor, size: int) -> Tensor:
    """Maps [n, H, W] in colours, each from its own least similarity (dark) to 1, the chosen cell framed.

    Returns:
        uint8 [n, 3, P, P], where P is `tile_px(size)` of the picture size `size`.
    """
    side, low = tile_px(size), maps.amin(dim=(1, 2), keepdim=True)
    levels = ((maps - low) / (1 - low).clamp(min=1e-6) * 255).clamp(0, 255).to(torch.uint8)
    table = torch.from_numpy(matplotlib.colormaps[COLOUR_MAP](range(256), bytes=True)[:, :3].copy())
    tiles = _enlarged(table[levels.long()].permute(0, 3, 1, 2), side)
    height, width = maps.shape[1:]
    for tile, row, column in zip(tiles, *cell_at(points, height, width), strict=True):
        top, bottom = (int(edge) * side // height for edge in (row, row + 1))
        left, right = (int(edge) * side // width for edge in (column, column + 1))
        _frame(tile, top, max(bottom, top + 2), left, max(right, left + 2))
    return tiles


def marked(images: Tensor, points: Tensor) -> Tensor:
    """Pictures uint8 [n, 3, S, S], enlarged as their maps, with a frame around each chosen point."""
    side = tile_px(images.shape[-1])
    tiles, half = _enlarged(images, side), max(side // (2 * NUM_CELLS), 3)
    for tile, point in zip(tiles, points, strict=True):
        row, column = (int(place * side) for place in point)
        _frame(tile, max(row - half, 0), min(row + half, side), max(column - half, 0), min(column + half, side))
    return tiles


def tile_px(size: int) -> int:
    """Side of a drawn picture of `size` pixels: the least multiple of it that is `LEAST_TILE_PX` or more."""
    return size * -(-LEAST_TILE_PX // size)


def _enlarged(images: Tensor, side: int) -> Tensor:
    """uint8 [n, 3, H, W] to [n, 3, side, side], every pixel a block."""
    return F.interpolate(images, size=(side, side), mode="nearest").clone()


def _frame(tile: Tensor, top: int, bottom: int, left: int, right: int) -> None:
    """Draw a frame into a tile uint8 [3, P, P], just inside the given edges."""
    colour, thick = torch.tensor(MARK, dtype=torch.uint8)[:, None, None], max(tile.shape[-1] // 64, 1)
    part = tile[:, top:bottom, left:right]
    for edge in (part[:, :thick], part[:, -thick:], part[:, :, :thick], part[:, :, -thick:]):
        edge[:] = colour
