"""Samplers of a network that predicts noise and its variance in discrete steps (DiT): DDPM and DDIM.

Shape letters: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sendvae_fast.models.diffusion import Diffusion
from sendvae_fast.models.sit.sizes import DIFFUSION_STEPS
from sendvae_fast.ops import philox
from sendvae_fast.sampling.guidance import GuidedVelocity


@torch.no_grad()
def diffusion_sample(
    network: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    sample_ids: Tensor,
    seed: int,
    num_steps: int,
    network_dtype: torch.dtype,
    on_step: Callable[[], object],
    *,
    draws: bool,
) -> Tensor:
    """From noise to latents in `num_steps` of the 1000 steps, in the dtype of z.

    Neither sampler clamps latents. Guidance is decided at step t by noise level t / 1000.

    Args:
        network: (x [B, C, H, W], step) to [B, 2C, H, W].
        num_steps: at least 2.
        draws: DDPM, which draws each step from the predicted distribution, the last without noise; else DDIM (η = 0),
            which takes the latent that the predicted noise leaves and puts that noise back.

    Other arguments as in `samplers.sample`.
    """
    diffusion = Diffusion.of(num_steps, z.device)
    steps = diffusion.steps.tolist()
    x = z
    for number in reversed(range(num_steps)):
        step = steps[number]
        of_step = network.decide_at(step / DIFFUSION_STEPS) if isinstance(network, GuidedVelocity) else network
        output = of_step(x.to(network_dtype), torch.tensor(float(step))).to(x.dtype)
        index = torch.full_like(sample_ids, number)
        if draws:
            x, log_variance = diffusion.predicted(output, x, index)
            if number > 0:
                key = philox.make_key(seed, number, z.device)
                noise = philox.normal(key, philox.Stream.SAMPLER_STEP, sample_ids, tuple(x.shape[1:]))
                x = x + (0.5 * log_variance).exp() * noise.to(x.dtype)
        else:
            noise = output.chunk(2, dim=1)[0]
            x = diffusion.toward(diffusion.latent(x, noise, index), noise, index)
        on_step()
    return x
