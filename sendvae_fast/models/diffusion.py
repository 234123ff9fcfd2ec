"""Diffusion in discrete steps with a learned variance, as DiT is trained and sampled.

DDPM (Ho et al., 2020) with the linear schedule of 1000 steps; the variance of Nichol & Dhariwal (2021, Section 3.1),
between its two bounds; fewer steps for sampling as there. Step 999 is nearly pure noise, step 0 the last before the
data.

    z_t = sqrt(ᾱ_t) z + sqrt(1 - ᾱ_t) ε

Shape letters: B batch, C latent channels, H W latent size, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sendvae_fast.models.sit.sizes import DIFFUSION_STEPS

_FIRST_BETA, _LAST_BETA = 1e-4, 0.02


@dataclass(frozen=True)
class Diffusion:
    """A schedule of T steps, of the 1000 or of some of them.

    The numbers are float64, and exact: between two steps that are taken, those that are not count.
    """

    steps: Tensor
    """The steps as the network knows them, int64 [T], ascending."""
    alpha_bar: Tensor
    """ᾱ, the share of the latent's variance that is left at each step, float64 [T]."""

    @classmethod
    def of(cls, num_steps: int = DIFFUSION_STEPS, device: torch.device | str = "cpu") -> Diffusion:
        """The schedule of `num_steps` steps, evenly over the 1000 with both ends (at least 2, or all 1000)."""
        betas = torch.linspace(_FIRST_BETA, _LAST_BETA, DIFFUSION_STEPS, dtype=torch.float64)
        stride = (DIFFUSION_STEPS - 1) / (num_steps - 1)
        steps = torch.tensor([round(stride * i) for i in range(num_steps)])
        return cls(steps.to(device), (1 - betas).cumprod(0)[steps].to(device))

    @cached_property
    def _alpha_bar_before(self) -> Tensor:
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @cached_property
    def _beta(self) -> Tensor:
        return 1 - self.alpha_bar / self._alpha_bar_before

    @cached_property
    def _log_posterior_variance(self) -> Tensor:
        variance = self._beta * (1 - self._alpha_bar_before) / (1 - self.alpha_bar)
        variance[0] = variance[1]  # it is 0: the first step's is taken to be the second's
        return variance.log()

    def noised(self, z: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """z_t of latents and noise [B, C, H, W] at steps number `index` of the schedule, int64 [B]."""
        return _at(self.alpha_bar.sqrt(), index, z) * z + _at((1 - self.alpha_bar).sqrt(), index, z) * noise

    def latent(self, z_t: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """The latent that z_t has if its noise is `noise`: the inverse of `noised`."""
        scale, shift = (1 / self.alpha_bar).sqrt(), (1 / self.alpha_bar - 1).sqrt()
        return _at(scale, index, z_t) * z_t - _at(shift, index, z_t) * noise

    def posterior(self, z: Tensor, z_t: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the step before, given the latent z: [B, C, H, W] and [B, 1, 1, 1]."""
        of_z = self._beta * self._alpha_bar_before.sqrt() / (1 - self.alpha_bar)
        of_z_t = (1 - self._alpha_bar_before) * (1 - self._beta).sqrt() / (1 - self.alpha_bar)
        mean = _at(of_z, index, z) * z + _at(of_z_t, index, z) * z_t
        return mean, _at(self._log_posterior_variance, index, z)

    def predicted(self, output: Tensor, z_t: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the step before, as a network's output [B, 2C, H, W] has them; each [B, C, H, W].

        The log-variance lies between the posterior's (at -1 of the output's second half) and log β (at 1).
        """
        noise, share = output.chunk(2, dim=1)
        mean, smallest = self.posterior(self.latent(z_t, noise, index), z_t, index)
        fraction = (share + 1) / 2
        return mean, fraction * _at(self._beta.log(), index, z_t) + (1 - fraction) * smallest

    def toward(self, z: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """z_t of the same latent and noise one step before `index`; z itself at the first. DDIM without noise."""
        before = self._alpha_bar_before
        return _at(before.sqrt(), index, z) * z + _at((1 - before).sqrt(), index, z) * noise


def _at(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """values[index] as [B, 1, 1, 1] in the dtype of `like`."""
    return values[index].to(like.dtype)[:, None, None, None]
