"""DDPM's schedule, its posterior and learned variance against diffusers' scheduler and against their definitions."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from sendvae_fast.losses.diffusion import noise_loss, variance_loss
from sendvae_fast.models.diffusion import Diffusion

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
    "timestep_spacing": "linspace",
}


def pair(seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.randn(3, 8, 2, 2, dtype=torch.float64)


@pytest.mark.parametrize("num_steps", [2, 7, 250, 1000])
def test_steps_are_those_of_diffusers(num_steps):
    theirs = DDPMScheduler(**SCHEDULE)
    theirs.set_timesteps(num_steps)
    ours = Diffusion.of(num_steps)
    assert ours.steps.flip(0).tolist() == theirs.timesteps.tolist()
    assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod[ours.steps], rtol=2e-5, atol=0)  # theirs is in float32


@pytest.mark.parametrize("number", [1, 5, 8])
def test_a_step_of_ddpm_is_that_of_diffusers(number):
    theirs = DDPMScheduler(variance_type="learned_range", **SCHEDULE)
    theirs.set_timesteps(9)
    ours = Diffusion.of(9)
    z_t, output = pair()
    step = int(ours.steps[number])
    expected = theirs.step(output.float(), step, z_t.float(), generator=torch.Generator().manual_seed(1)).prev_sample
    noise = torch.randn(z_t.shape, generator=torch.Generator().manual_seed(1))
    mean, log_variance = ours.predicted(output, z_t, torch.full((3,), number))
    assert_close((mean + (0.5 * log_variance).exp() * noise).float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", [0, 1, 500, 999])
def test_a_step_of_ddim_is_that_of_diffusers(number):
    theirs = DDIMScheduler(set_alpha_to_one=True, **SCHEDULE)  # after the last step comes the latent itself
    theirs.set_timesteps(1000)
    ours = Diffusion.of()
    z_t, output = pair()
    noise, index = output[:, :4], torch.full((3,), number)
    expected = theirs.step(noise.float(), number, z_t.float()).prev_sample
    assert_close(ours.toward(ours.latent(z_t, noise, index), noise, index).float(), expected, rtol=1e-4, atol=1e-4)


def test_posterior_is_bayes():
    """q(z_{t-1} | z_t, z) is q(z_t | z_{t-1}) q(z_{t-1} | z) up to its integral: compared as precisions and means."""
    diffusion, (z, _) = Diffusion.of(), pair()
    z_t = torch.randn_like(z)
    for step in (1, 500, 999):
        now, before = diffusion.alpha_bar[step], diffusion.alpha_bar[step - 1]
        alpha = now / before
        precision = alpha / (1 - alpha) + 1 / (1 - before)
        mean = (alpha.sqrt() * z_t / (1 - alpha) + before.sqrt() * z / (1 - before)) / precision
        found, log_variance = diffusion.posterior(z, z_t, torch.full((3,), step))
        assert_close(found, mean)
        assert_close(log_variance.exp().flatten()[0], 1 / precision)


def test_variance_loss_is_the_divergence_of_two_normal_distributions():
    diffusion, (z, output) = Diffusion.of(), pair()
    index = torch.tensor([3, 400, 998])
    z_t = diffusion.noised(z, torch.randn_like(z), index)
    mean, log_variance = diffusion.predicted(output, z_t, index)
    true_mean, true_log_variance = diffusion.posterior(z, z_t, index)
    truth = torch.distributions.kl_divergence(
        torch.distributions.Normal(true_mean, (0.5 * true_log_variance).exp().expand_as(true_mean)),
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
    )
    found = variance_loss(diffusion, output, z, z_t, index)
    assert float(found) == pytest.approx(float(truth.mean() / torch.log(torch.tensor(2.0))), rel=1e-3)


def test_last_step_is_the_likelihood_of_a_grey_level():
    diffusion = Diffusion.of()
    z = torch.tensor([-1.0, -0.3, 0.5, 1.0], dtype=torch.float64).reshape(1, 4, 1, 1)
    index = torch.zeros(1, dtype=torch.int64)
    z_t = diffusion.noised(z, torch.full_like(z, 0.1), index)
    output = torch.cat([torch.full_like(z, 0.2), torch.full_like(z, 0.5)], dim=1)
    mean, log_variance = diffusion.predicted(output, z_t, index)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    mass = normal.cdf(z + 1 / 255) - normal.cdf(z - 1 / 255)
    mass[0, 0], mass[0, 3] = normal.cdf(z + 1 / 255)[0, 0], 1 - normal.cdf(z - 1 / 255)[0, 3]
    truth = -mass.log().mean() / torch.log(torch.tensor(2.0))
    # The tanh form of the distribution function is within 3e-4 of it.
    assert float(variance_loss(diffusion, output, z, z_t, index)) == pytest.approx(float(truth), rel=1e-2)


def test_variance_learns_without_moving_the_noise():
    diffusion, (z, output) = Diffusion.of(), pair()
    output.requires_grad_()
    noise, index = torch.randn_like(z), torch.tensor([10, 500, 900])
    z_t = diffusion.noised(z, noise, index)
    (of_variance,) = torch.autograd.grad(variance_loss(diffusion, output, z, z_t, index), output)
    (of_noise,) = torch.autograd.grad(noise_loss(output, noise), output)
    assert not of_variance[:, :4].any() and of_variance[:, 4:].all()
    assert of_noise[:, :4].all() and not of_noise[:, 4:].any()
    assert_close(of_noise[:, :4], 2 * (output[:, :4] - noise).detach() / noise.numel())
