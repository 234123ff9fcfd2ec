"""Strips of pictures over their segmentation and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from sendvae_fast.downstream.dense_data import VOID
from sendvae_fast.image_grid import save_grid

Maps = tuple[Tensor, Tensor | None]
"""Segments uint8 [n, S, S], and distances float32 [n, S, S] where they are known."""


def save_strips(path: Path, pictures: Tensor, rows: Sequence[Maps], num_segments: int) -> None:
    """Write a PNG with a column per picture: the picture, then all segmentations, then all depths (near is bright).

    Args:
        path: of the PNG.
        pictures: uint8 [m, 3, S, S].
        rows: maps of at least these pictures, each a row of segments and a row of distances.
        num_segments: colours of the segments.
    """
    num = len(pictures)
    segments = [_segment_colours(row[0][:num].cpu(), num_segments) for row in rows]
    distances = [row[1][:num].cpu() for row in rows if row[1] is not None]
    if distances:
        nearness = -torch.cat([each.clamp(min=1e-6).log() for each in distances])
        low, high = nearness.min(), nearness.max()
        coloured = _colours("viridis", ((nearness - low) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8))
        segments += coloured.split(num)
    save_grid(path, torch.cat([pictures.cpu(), *segments]), columns=num)


def _segment_colours(segments: Tensor, num_segments: int) -> Tensor:
    """uint8 [m, 3, S, S]: a colour of matplotlib's `tab10` each, the first dark, pixels that are not counted white."""
    palette = matplotlib.colormaps["tab10"](range(num_segments), bytes=True)[:, :3]
    palette[0] = 30
    table = torch.full((VOID + 1, 3), 255, dtype=torch.uint8)
    table[:num_segments] = torch.from_numpy(palette)
    return table[segments.long()].permute(0, 3, 1, 2)


def _colours(name: str, levels: Tensor) -> Tensor:
    """uint8 [m, 3, S, S] of levels uint8 [m, S, S] in a colour map of matplotlib."""
    table = torch.from_numpy(matplotlib.colormaps[name](range(256), bytes=True)[:, :3])
    return table[levels.long()].permute(0, 3, 1, 2)
