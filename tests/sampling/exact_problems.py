"""Gaussian data, whose velocity is known in closed form, and what samples of them are compared with."""

from itertools import pairwise

import torch

from sendvae_fast.sampling.samplers import initial_noise, time_grid

MEAN = torch.tensor([0.8, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.9, 0.35], [0.35, 0.3]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


def gaussian_velocity_matrix(t):
    """A, b of E[ε - z | x_t = x] = A x + b for z ~ N(MEAN, COVARIANCE)."""
    t = float(t)
    spread = (1 - t) ** 2 * COVARIANCE + t**2 * EYE
    matrix = (t * EYE - (1 - t) * COVARIANCE) @ torch.linalg.inv(spread)
    return matrix, -MEAN - (1 - t) * matrix @ MEAN


def gaussian_velocity(x, t):
    """x [B, 2, 1, 1]."""
    matrix, offset = gaussian_velocity_matrix(t)
    return (x.flatten(1).double() @ matrix.T + offset).reshape(x.shape).to(x.dtype)


def start(num, seed=0, shape=(2, 1, 1)):
    ids = torch.arange(num)
    return ids, initial_noise(seed, ids, shape).double()


def euler_maruyama_moments(config, stop=0.0):
    """Mean and covariance of the discretised SDE at noise level `stop` for Gaussian data: all its steps are affine."""
    mean, covariance = torch.zeros(2, dtype=torch.float64), EYE.clone()
    times = [t for t in time_grid(config).tolist() if t >= stop]
    for t, t_next in pairwise(times):
        dt = t_next - t
        matrix, offset = gaussian_velocity_matrix(t)
        step = EYE + ((2 - t) * matrix + EYE) * dt
        mean = step @ mean + (2 - t) * offset * dt
        covariance = step @ covariance @ step.T
        if t_next > 0:
            covariance = covariance + 2 * t * abs(dt) * EYE
    return mean, covariance


def assert_moments_close(samples, mean, covariance, deviations=4.0):
    """Within `deviations` standard errors of a sample of this size."""
    num = len(samples)
    variances = covariance.diagonal()
    assert ((samples.mean(0) - mean).abs() < deviations * (variances / num).sqrt()).all()
    error = ((variances[:, None] * variances + covariance**2) / num).sqrt()
    assert ((samples.T.cov() - covariance).abs() < deviations * error).all()
