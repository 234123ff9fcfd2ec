"""What stage 1 asks of a network from latents to features, whichever alignment method it belongs to.

Shape letters: B batch, C latent channels, H W latent size, P patch size, N = H W / P² tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class LatentMapper(nn.Module):
    """A network from latents to features of a foundation model's width, which says what latents it takes."""

    reads: Literal["z", "z_t"]
    """Which latents it takes. z: the posterior's sample [B, C, H, W], as the decoder does. z_t: that sample normalised,
    and noised where `noise` says so."""
    patch_size: int | None
    """P, to take z_t as tokens [B, N, C P P]; None to take it as [B, C, H, W]. z is never cut into tokens."""
    noise: bool
    """Whether z_t is noised (Equation 1 of Send-VAE) or only normalised (its Table 3)."""

    def forward(self, latents: Tensor, /) -> Tensor:
        """The latents that `reads` and `patch_size` ask for to features [B, N, target_dim], row-major."""
        raise NotImplementedError
