"""The common form of all families of foundation models: a network that gives tokens, and its preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sendvae_fast.models.foundation.preprocessing import Preprocessing


@dataclass(frozen=True)
class Backbone:
    """A feature network and its preprocessing."""

    tokens: nn.Module
    """Normalised images [B, 3, image_size, image_size] to tokens [B, grid_size ** 2, dim]."""
    image_size: int
    grid_size: int
    dim: int
    preprocessing: Preprocessing
