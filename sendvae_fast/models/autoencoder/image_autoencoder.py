"""An autoencoder as everything but its own training sees it: latent caches, generators, sampling, evaluation.

Shape letters: B batch, C latent channels, H W latent size, S image size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LatentShape = tuple[int, int, int]
"""C, H, W. Latents that are no grid of the picture have H = 1 and a position a token."""

LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances outside this range are clamped, as latent-diffusion does."""


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian of a picture's latent."""

    mean: Tensor  # [B, C, H, W]
    logvar: Tensor  # [B, C, H, W]; -inf where the encoder draws nothing

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Split moments [B, 2C, H, W] into mean and log-variance, which is clamped to LOGVAR_RANGE."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @classmethod
    def of_latent(cls, latent: Tensor) -> Posterior:
        """All of the probability at one latent [B, C, H, W]: the standard deviation is exactly 0."""
        return cls(latent, torch.full_like(latent, -torch.inf))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)


class ImageAutoencoder(nn.Module, ABC):
    """Pictures to a posterior of latents, and latents to pictures. Pictures are square and in [-1, 1]."""

    config: Any
    """A dataclass of plain values that tells the network's sizes, `latent_channels` among them."""

    @abstractmethod
    def posterior(self, x: Tensor) -> Posterior:
        """Encode pictures [B, 3, S, S]; `UserError` for a size that the network does not take."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, H, W] to pictures [B, 3, S, S], near [-1, 1] but not clamped."""

    @abstractmethod
    def latent_shape(self, image_size: int) -> LatentShape:
        """The latents of pictures of `image_size` pixels a side; `UserError` for a size the network does not take."""

    @abstractmethod
    def image_size(self, latent_shape: LatentShape) -> int:
        """Pixels a side of what latents of this shape decode to; `UserError` for a shape it does not decode."""

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct pictures [B, 3, S, S] through the posterior mean."""
        return self.decode(self.posterior(x).mean)
