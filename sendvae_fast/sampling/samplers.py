"""From noise to latents: the Euler-Maruyama SDE sampler of the paper's numbers, ODE samplers, and DiT's.

Noise depends on (seed, step, sample id) alone, so a sample is the same in any batch and on any number of ranks; with
`dopri5`, which chooses its steps for a batch as a whole, it is the same only within the tolerances.

Shape letters: B batch, C latent channels, H W latent height and width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.ops import philox, sde_step
from sendvae_fast.sampling.diffusion_samplers import diffusion_sample
from sendvae_fast.sampling.guidance import GuidedVelocity
from sendvae_fast.sampling.settings import SamplerConfig

# (x [B, C, H, W] in the network's dtype, t float64 scalar) -> velocity [B, C, H, W]
Velocity = Callable[[Tensor, Tensor], Tensor]


def time_grid(config: SamplerConfig) -> Tensor:
    """The noise levels that a sampler of a flow visits, from 1 down to 0: float64 [num_steps + 1] on the CPU.

    `sde`: linspace(1, last_step, num_steps), then 0. ODE: u of linspace(1, 0, num_steps + 1) becomes
    u / (1 + (s - 1) (1 - u)), s = timestep_shift. That is LightningDiT's s τ / (1 + (s - 1) τ) in its clock τ = 1 - u,
    which runs from noise to data; a formula of that shape in noise levels, as Stable Diffusion 3 has, takes 1 / s.
    """
    if config.kind == "sde":
        levels = torch.linspace(1, config.last_step, config.num_steps, dtype=torch.float64)
        return torch.cat([levels, levels.new_zeros(1)])
    levels = torch.linspace(1, 0, config.num_steps + 1, dtype=torch.float64)
    return levels / (1 + (config.timestep_shift - 1) * (1 - levels))


def initial_noise(seed: int, sample_ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape] to start from at t = 1. sample_ids int64 [B], on the device to sample on."""
    return philox.normal(philox.make_key(seed, 0, sample_ids.device), philox.Stream.SAMPLER_INIT, sample_ids, shape)


@torch.no_grad()
def euler_maruyama(
    velocity: Velocity,
    z: Tensor,
    sample_ids: Tensor,
    seed: int,
    config: SamplerConfig,
    network_dtype: torch.dtype,
    on_step: Callable[[], object],
) -> Tensor:
    """The reverse SDE: x <- x + d(x, t) Δt + sqrt(w(t) |Δt|) ε, and x <- x + d(x, t) Δt in the last step.

    The same numbers of steps, grid, precision and order of operations as REPA's and REPA-E's sampler
    (d and w in `ops.sde_step`, which is a step); only the noise comes from elsewhere. Guidance is
    computed in the state's precision. Arguments as in `sample`.
    """
    times = time_grid(config)
    device_times = times.to(z.device)
    x, network_input = z.to(getattr(torch, config.dtype)), z.to(network_dtype)
    # All at once: a copy from the host in every step would make it wait for the GPU.
    keys = torch.stack([philox.make_key(seed, step) for step in range(config.num_steps)]).to(z.device)
    for step in range(config.num_steps):
        if isinstance(velocity, GuidedVelocity):
            v, scale = velocity.uncombined(network_input, times[step])
        else:
            v, scale = velocity(network_input, times[step]), None
        x, network_input = sde_step(
            x, v.to(network_dtype), device_times[step : step + 2], keys[step], sample_ids,
            guidance_scale=scale, last=step == config.num_steps - 1,
        )  # fmt: skip
        on_step()
    return x.to(z.dtype)


@torch.no_grad()
def euler(
    velocity: Velocity, z: Tensor, config: SamplerConfig, network_dtype: torch.dtype, on_step: Callable[[], object]
) -> Tensor:
    """The probability-flow ODE dx = v dt by Euler's method, of first order. Arguments as in `sample`."""
    times = time_grid(config)
    x = z.to(getattr(torch, config.dtype))
    for t, t_next in pairwise(times):
        x = x + velocity(x.to(network_dtype), t).to(x.dtype) * (t_next - t)
        on_step()
    return x.to(z.dtype)


@torch.no_grad()
def heun(
    velocity: Velocity, z: Tensor, config: SamplerConfig, network_dtype: torch.dtype, on_step: Callable[[], object]
) -> Tensor:
    """The probability-flow ODE by Heun's method, of second order; the last step is Euler's, as in REPA's sampler.

    Both halves of a step are guided, or neither is, by the step's first noise level. Arguments as in `sample`.
    """
    times = time_grid(config)
    x = z.to(getattr(torch, config.dtype))
    for t, t_next in pairwise(times):
        of_step = velocity.decide_at(float(t)) if isinstance(velocity, GuidedVelocity) else velocity
        slope = of_step(x.to(network_dtype), t).to(x.dtype)
        if t_next > 0:
            ahead = x + slope * (t_next - t)
            slope = (slope + of_step(ahead.to(network_dtype), t_next).to(x.dtype)) / 2
        x = x + slope * (t_next - t)
        on_step()
    return x.to(z.dtype)


@torch.no_grad()
def dopri5(
    velocity: Velocity, z: Tensor, config: SamplerConfig, network_dtype: torch.dtype, on_step: Callable[[], object]
) -> Tensor:
    """The probability-flow ODE by torchdiffeq's adaptive Dormand-Prince method of fifth order.

    A step's error is judged over the batch as a whole. Steps are not announced: `on_step` is called `num_steps` times
    at the end. Other arguments as in `sample`.
    """
    from torchdiffeq import odeint  # pyright: ignore[reportMissingImports] - an extra

    x = z.to(getattr(torch, config.dtype))
    ends = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device)
    path: Any = odeint(  # a tensor for a tensor, which its own annotations leave open
        lambda t, y: velocity(y.to(network_dtype), t).to(y.dtype), x, ends, method="dopri5", atol=config.atol,
        rtol=config.rtol,
    )  # fmt: skip
    for _ in range(config.num_steps):
        on_step()
    return path[-1].to(z.dtype)


def sample(
    velocity: Velocity,
    z: Tensor,
    sample_ids: Tensor,
    seed: int,
    config: SamplerConfig,
    on_step: Callable[[], object] = lambda: None,
    network_dtype: torch.dtype | None = None,
) -> Tensor:
    """Go from noise at t = 1 to latents at t = 0, with the sampler that `config.kind` names.

    velocity: (x [B, C, H, W] in the network's dtype, t float64 scalar) -> [B, C, H, W]; often `guidance.guided(...)`.
    For `ddpm` and `ddim` what `diffusion_sample` takes.
    z: [B, C, H, W], `initial_noise(...)`. sample_ids: int64 [B] on z's device.
    on_step: called after each of the `num_steps` steps (`Progress.advance`, say).
    network_dtype: the dtype of the state that the network sees; z's without it.
    Returns [B, C, H, W] in z's dtype. Raises UserError where the result is not finite.
    """
    network_dtype = network_dtype or z.dtype
    if config.kind == "sde":
        latents = euler_maruyama(velocity, z, sample_ids, seed, config, network_dtype, on_step)
    elif config.is_diffusion:
        x, draws = z.to(getattr(torch, config.dtype)), config.kind == "ddpm"
        latents = diffusion_sample(
            velocity, x, sample_ids, seed, config.num_steps, network_dtype, on_step, draws=draws
        ).to(z.dtype)
    else:
        integrate = {"euler": euler, "heun": heun, "dopri5": dopri5}[config.kind]
        latents = integrate(velocity, z, config, network_dtype, on_step)
    broken = ~latents.flatten(1).isfinite().all(dim=1)
    if broken.any():
        raise UserError(
            f"the generator's output is not finite for sample ids {sample_ids[broken][:5].tolist()}; "
            "the checkpoint is damaged or diverged, or its numbers overflow in this precision: sample in float32"
        )
    return latents
