"""Samplers against closed forms: where the data are Gaussian (or a mixture), the exact velocity is known."""

import math
import sys

import pytest
import torch
from exact_problems import (
    COVARIANCE,
    EYE,
    MEAN,
    assert_moments_close,
    euler_maruyama_moments,
    gaussian_velocity,
    start,
)

from sendvae_fast.errors import UserError
from sendvae_fast.sampling.guidance import guided
from sendvae_fast.sampling.samplers import sample
from sendvae_fast.sampling.settings import SamplerConfig

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_steps", [10, 250])
def test_sde_reaches_the_discrete_process_exactly(num_steps):
    """Ten steps leave the data by far more than the Monte-Carlo error: what is seen is the process itself."""
    config = SamplerConfig(num_steps=num_steps)
    ids, noise = start(20_000)
    samples = sample(gaussian_velocity, noise, ids, seed=0, config=config).flatten(1)
    assert_moments_close(samples, *euler_maruyama_moments(config))


def test_250_steps_of_the_sde_nearly_reach_the_data():
    mean, covariance = euler_maruyama_moments(SamplerConfig(num_steps=250))
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.01)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=0.02)


def test_weak_order_of_the_sde():
    """Up to the last step, whose length is fixed, the covariance approaches that of p_t by the first order.

    The mean is exact from the start: its path is a straight line, which Euler's method follows.
    """
    t = 0.04
    spread = (1 - t) ** 2 * COVARIANCE + t**2 * EYE

    def error(num_steps):
        mean, covariance = euler_maruyama_moments(SamplerConfig(num_steps=num_steps, last_step=t), stop=t)
        torch.testing.assert_close(mean, (1 - t) * MEAN, rtol=0, atol=1e-12)
        return (covariance - spread).norm().item()

    assert abs(math.log2(error(200) / error(400)) - 1) < 0.05


@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_ode_reaches_mean_and_covariance(kind):
    ids, noise = start(20_000)
    samples = sample(gaussian_velocity, noise, ids, seed=0, config=SamplerConfig(kind=kind, num_steps=250)).flatten(1)
    assert_moments_close(samples, MEAN, COVARIANCE)


@pytest.mark.parametrize("timestep_shift", [1.0, 0.3])
@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(kind, order, timestep_shift):
    ids, noise = start(16)
    eigenvalues, axes = torch.linalg.eigh(COVARIANCE)
    root = axes @ eigenvalues.sqrt().diag() @ axes.T
    exact = MEAN + noise.flatten(1) @ root  # the flow carries ε to m + S^(1/2) ε

    def error(num_steps):
        config = SamplerConfig(kind=kind, num_steps=num_steps, timestep_shift=timestep_shift)
        return (sample(gaussian_velocity, noise, ids, 0, config).flatten(1) - exact).abs().max().item()

    observed = math.log2(error(100) / error(200))
    assert abs(observed - order) < 0.15


@pytest.mark.parametrize("config", [
    SamplerConfig(), SamplerConfig(kind="euler", timestep_shift=0.3), SamplerConfig(kind="heun", num_steps=100)
], ids=lambda config: config.kind)  # fmt: skip
def test_a_mixture_gets_its_weights_means_and_covariances(config):
    weights = torch.tensor([0.3, 0.7]).double()
    means = torch.tensor([[-2.0, 0.7], [2.0, -0.7]]).double()  # midway is over 4 deviations from each
    covariances = torch.tensor([[[0.10, 0.06], [0.06, 0.20]], [[0.20, -0.08], [-0.08, 0.08]]]).double()

    def velocity(x, t):
        t, x_flat = float(t), x.flatten(1)
        shares, velocities = [], []
        for weight, mean, covariance in zip(weights, means, covariances, strict=True):
            spread = (1 - t) ** 2 * covariance + t**2 * EYE
            centred = x_flat - (1 - t) * mean
            whitened = centred @ torch.linalg.inv(spread)
            shares.append(weight.log() - spread.logdet() / 2 - (whitened * centred).sum(1) / 2)
            velocities.append(whitened @ (t * EYE - (1 - t) * covariance) - mean)
        shares = torch.stack(shares).softmax(0)[:, :, None]  # [2, B, 1]
        return (shares * torch.stack(velocities)).sum(0).reshape(x.shape)

    ids, noise = start(10_000)
    samples = sample(velocity, noise, ids, seed=0, config=config).flatten(1)
    is_second = samples @ (means[1] - means[0]) > 0
    share = is_second.double().mean().item()
    assert abs(share - 0.7) < 4 * math.sqrt(0.3 * 0.7 / len(samples))
    for of_component, mean, covariance in zip((~is_second, is_second), means, covariances, strict=True):
        assert_moments_close(samples[of_component], mean, covariance)


@pytest.mark.parametrize("kind", ["sde", "heun"])
@pytest.mark.parametrize("channels", [None, 1])
def test_guidance_of_gaussians_is_exact(kind, channels):
    """With one covariance for the class and for all, guidance everywhere is the velocity of a third Gaussian.

    Its mean is m_all + scale (m_class - m_all) in the guided channels and m_class in the others.
    """
    means = torch.tensor([[0.5, -0.4], [-0.3, 0.2]], dtype=torch.float64)  # of the class, and of all
    variance, scale = torch.tensor([0.3, 0.6], dtype=torch.float64), 2.5

    def model(x, t, labels):
        t = t.double()[:, None]
        centred = (x.flatten(1) - (1 - t) * means[labels]) / ((1 - t) ** 2 * variance + t**2)
        return ((t - (1 - t) * variance) * centred - means[labels]).reshape(x.shape), None

    ids, noise = start(20_000)
    velocity = guided(model, torch.zeros_like(ids), scale, (0.0, 1.0), num_classes=1, channels=channels)
    samples = sample(velocity, noise, ids, 0, SamplerConfig(kind=kind, num_steps=100)).flatten(1)
    expected = means[1] + scale * (means[0] - means[1])
    if channels is not None:
        expected[channels:] = means[0, channels:]
    # The SDE's own error in 100 steps is 0.0105 in these variances and none in the mean (see the test of its order).
    bias = 0.0105 if kind == "sde" else 0.0
    assert ((samples.mean(0) - expected).abs() < 4 * (variance / len(samples)).sqrt()).all()
    error = (variance[:, None] * variance / len(samples) * (1 + EYE)).sqrt()
    assert ((samples.T.cov() - variance.diag()).abs() < 4 * error + bias * EYE).all()


class TorchdiffeqStandIn:
    """`odeint` with torchdiffeq's arguments, by the classical Runge-Kutta method."""

    def odeint(self, func, y0, t, *, method, atol, rtol):
        assert method == "dopri5" and (atol, rtol) == (1e-6, 1e-3) and t.dtype == y0.dtype
        h, y = (t[1] - t[0]) / 64, y0
        for step in range(64):
            now = t[0] + step * h
            a = func(now, y)
            b = func(now + h / 2, y + h / 2 * a)
            c = func(now + h / 2, y + h / 2 * b)
            d = func(now + h, y + h * c)
            y = y + h / 6 * (a + 2 * b + 2 * c + d)
        return torch.stack([y0, y])


def assert_dopri5_reaches_the_data():
    ids, noise = start(16)
    eigenvalues, axes = torch.linalg.eigh(COVARIANCE)
    exact = MEAN + noise.flatten(1) @ (axes @ eigenvalues.sqrt().diag() @ axes.T)
    steps = []
    config = SamplerConfig(kind="dopri5", num_steps=7)
    samples = sample(gaussian_velocity, noise, ids, 0, config, on_step=lambda: steps.append(1)).flatten(1)
    torch.testing.assert_close(samples, exact, rtol=0, atol=5e-3)
    assert len(steps) == 7


def test_dopri5_calls_torchdiffeq_as_documented(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", TorchdiffeqStandIn())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert_dopri5_reaches_the_data()


def test_dopri5_itself_reaches_the_data():
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    assert_dopri5_reaches_the_data()


def test_dopri5_without_torchdiffeq_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"dopri5 needs the package torchdiffeq: pip install 'sendvae_fast\[ode\]'"):
        SamplerConfig(kind="dopri5")
