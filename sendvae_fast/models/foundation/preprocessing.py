"""The preprocessing of foundation models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The preprocessing of a network's input. The defaults are ImageNet's statistics of pixels in [0, 1]."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    antialias: bool = False


IMAGENET = Preprocessing()
"""Normalised by ImageNet's statistics, resized bicubically without antialiasing."""
