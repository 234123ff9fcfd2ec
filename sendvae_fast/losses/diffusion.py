"""The losses of a network that predicts noise and its variance (DiT).

Shape letters: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sendvae_fast.models.diffusion import Diffusion

_BIN = 1 / 255
"""Half the width of a grey level in [-1, 1]: the likelihood of the last step is that of pictures, also for latents."""


def noise_loss(output: Tensor, noise: Tensor) -> Tensor:
    """Mean of ``(ε̂ - ε)²``: of the output [B, 2C, H, W] the first half. A float32 scalar."""
    return F.mse_loss(output.float().chunk(2, dim=1)[0], noise.float())


def variance_loss(diffusion: Diffusion, output: Tensor, z: Tensor, z_t: Tensor, index: Tensor) -> Tensor:
    """The variational bound of a step in bits per element, as a loss of the variance alone; a float32 scalar.

    KL divergence of the step before, from the truth to the prediction, whose mean is held fixed; at the last step the
    negative log-likelihood of the data as grey levels (Nichol & Dhariwal 2021, `L_vlb`; DiT adds it to the noise's loss
    with weight 1).

    Args:
        diffusion: the schedule of training.
        output: the network's, [B, 2C, H, W].
        z: latents [B, C, H, W].
        z_t: what the network saw, like z.
        index: steps, int64 [B].
    """
    noise, share = output.float().chunk(2, dim=1)
    z, z_t = z.float(), z_t.float()
    mean, log_variance = diffusion.predicted(torch.cat([noise.detach(), share], dim=1), z_t, index)
    true_mean, true_log_variance = diffusion.posterior(z, z_t, index)
    difference = true_log_variance - log_variance
    kl = 0.5 * (difference.exp() - 1 - difference + (true_mean - mean).square() * (-log_variance).exp())
    likelihood = _log_likelihood(z, mean, 0.5 * log_variance)
    bound = torch.where(index[:, None, None, None] == 0, -likelihood, kl)
    return bound.mean() / math.log(2)


def _log_likelihood(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of a normal distribution's mass in the grey level around z, whose outermost levels have no end."""
    lower, upper = ((z - mean + side) * (-log_std).exp() for side in (-_BIN, _BIN))
    below, inside, above = _mass(upper), _mass(upper) - _mass(lower), 1 - _mass(lower)
    mass = torch.where(z < -0.999, below, torch.where(z > 0.999, above, inside))
    return mass.clamp(min=1e-12).log()


def _mass(x: Tensor) -> Tensor:
    """The standard normal distribution function in the approximation by tanh that DiT's code takes."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
