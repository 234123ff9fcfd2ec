"""The common form of all families of foundation models: a network that gives tokens, and its preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The preprocessing of a network's input."""

    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    antialias: bool = False


IMAGENET = Preprocessing()
"""Normalised by ImageNet's statistics, resized bicubically without antialiasing."""


@dataclass(frozen=True)
class Backbone:
    """A feature network and its preprocessing."""

    tokens: nn.Module
    """Normalised images [B, 3, image_size, image_size] to tokens [B, grid_size ** 2, dim]."""
    image_size: int
    grid_size: int
    dim: int
    preprocessing: Preprocessing
