import torch
from torch.autograd.functional import jvp

from sendvae_fast.sampling import path


def test_path_runs_from_data_to_noise_with_the_target_velocity():
    z, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind(0)
    assert torch.equal(path.interpolate(z, noise, 0.0), z)
    assert torch.equal(path.interpolate(z, noise, 1.0), noise)
    t = torch.tensor(0.3, dtype=torch.float64)
    _, slope = jvp(lambda t: path.interpolate(z, noise, t), t, torch.ones_like(t))
    torch.testing.assert_close(slope, path.velocity_target(z, noise))


def test_time_broadcasts_over_a_batch():
    z, noise = torch.randn(2, 3, 4, 5, 5).unbind(0)
    t = torch.tensor([0.1, 0.5, 0.9])
    batched = path.interpolate(z, noise, t[:, None, None, None])
    for i in range(3):
        assert torch.equal(batched[i], path.interpolate(z[i], noise[i], t[i]))


def gaussian_velocity(x, t, mean, variance):
    """E[ε - z | x_t = x] for z ~ N(mean, variance), one dimension at a time."""
    centred = (x - (1 - t) * mean) / ((1 - t) ** 2 * variance + t**2)
    return t * centred - mean - (1 - t) * variance * centred


def test_score_is_the_gradient_of_the_log_density():
    mean, variance = 0.7, 0.4
    for t in (0.04, 0.5, 1.0):
        x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
        log_density = -((x - (1 - t) * mean) ** 2) / (2 * ((1 - t) ** 2 * variance + t**2))
        (expected,) = torch.autograd.grad(log_density.sum(), x)
        score = path.score(x.detach(), gaussian_velocity(x.detach(), t, mean, variance), t)
        torch.testing.assert_close(score, expected)


def test_drift_is_velocity_less_half_the_diffusion_times_score():
    x, velocity = torch.randn(2, 50, dtype=torch.float64).unbind(0)
    for t in (0.04, 0.5, 1.0):
        expected = velocity - 0.5 * path.sde_diffusion(t) * path.score(x, velocity, t)
        torch.testing.assert_close(path.sde_drift(x, velocity, t), expected)
    assert path.sde_drift(x, velocity, 0.0).isfinite().all()
