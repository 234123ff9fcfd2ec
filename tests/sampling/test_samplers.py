"""Samplers against closed forms: where the data are Gaussian (or a mixture), the exact velocity is known."""

import math

import pytest
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.ops import philox, use_backend
from sendvae_fast.sampling.guidance import guided
from sendvae_fast.sampling.samplers import SamplerConfig, initial_noise, sample, time_grid

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


def euler_maruyama_moments(config):
    """Mean and covariance that the discretised SDE has for Gaussian data: all its steps are affine."""
    mean, covariance = torch.zeros(2, dtype=torch.float64), EYE.clone()
    times = time_grid(config).tolist()
    for t, t_next in zip(times[:-1], times[1:], strict=True):
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


def test_sde_reaches_the_discrete_process_exactly_and_the_data_nearly():
    config = SamplerConfig(num_steps=250)
    ids, noise = start(20_000)
    samples = sample(gaussian_velocity, noise, ids, seed=0, config=config).flatten(1)
    mean, covariance = euler_maruyama_moments(config)
    assert_moments_close(samples, mean, covariance)
    # 250 steps and a noise-free last one leave this much between the process and the data
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.01)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=0.02)


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


@pytest.mark.parametrize("kind", ["euler", "heun"])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_the_shifted_grid_is_lightningdits_in_the_other_clock(kind, shift):
    """Its formula as published, on times that run from noise (0) to data (1)."""
    forward = [step / 249 for step in range(250)]
    shifted = [shift * time / (1 + (shift - 1) * time) for time in forward]
    grid = time_grid(SamplerConfig(kind=kind, num_steps=249, timestep_shift=shift)).tolist()
    assert grid == pytest.approx([1 - time for time in shifted], abs=1e-14)
    assert grid[0] == 1 and grid[-1] == 0


def test_a_guided_sde_leaves_the_other_channels_as_without_guidance():
    """The model acts on each channel alone, so that guidance of one cannot reach another through the network."""
    ids = torch.tensor([5, 2, 7])
    noise = initial_noise(3, ids, (4, 4, 4))

    def model(x, t, labels):
        return torch.tanh(x) * (1 + t + labels)[:, None, None, None] / 4, None

    def draw(scale, channels=None):
        velocity = guided(model, torch.tensor([1, 2, 0]), scale, (0.0, 1.0), num_classes=3, channels=channels)
        return sample(velocity, noise, ids, 3, SamplerConfig(num_steps=20))

    plain, everywhere, first = draw(1.0), draw(1.8), draw(1.8, channels=3)
    assert torch.equal(first[:, :3], everywhere[:, :3]) and torch.equal(first[:, 3:], plain[:, 3:])
    assert not torch.equal(everywhere[:, 3:], plain[:, 3:])


def test_sde_agrees_with_a_plain_writing_of_the_published_sampler():
    ids, noise = torch.tensor([5, 2]), torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def velocity(x, t):
        return torch.tanh(x) * (1 + t) - 0.3

    x, times = noise, torch.cat([torch.linspace(1, 0.04, 50, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    for step in range(50):
        t, dt = times[step], times[step + 1] - times[step]
        v = velocity(x, t)
        alpha_ratio = (1 - t) / -1
        variance = t**2 - alpha_ratio * 1 * t
        score = (alpha_ratio * v - x) / variance
        drift = v - 0.5 * (2 * t) * score
        x = x + drift * dt
        if step < 49:
            key = philox.make_key(11, step)
            eps = philox.normal(key, philox.Stream.SAMPLER_STEP, ids, (3, 4, 4), dtype=torch.float64)
            x = x + torch.sqrt(2 * t) * eps * torch.sqrt(dt.abs())
    torch.testing.assert_close(sample(velocity, noise, ids, 11, SamplerConfig(num_steps=50)), x, rtol=1e-9, atol=1e-9)


def test_sde_has_250_evaluations_and_249_noises(monkeypatch):
    seen, drawn = [], []
    true_normal = philox.normal

    def counted_normal(key, *args, **options):
        drawn.append(key)
        return true_normal(key, *args, **options)

    monkeypatch.setattr(philox, "normal", counted_normal)
    steps = []

    def velocity(x, t):
        seen.append(float(t))
        return torch.zeros_like(x)

    ids = torch.arange(2)
    with use_backend("reference"):  # the compiled ones draw inside
        sample(velocity, torch.randn(2, 1, 2, 2), ids, 3, SamplerConfig(), on_step=lambda: steps.append(1))
    torch.testing.assert_close(torch.tensor(seen).double(), torch.linspace(1, 0.04, 250).double(), rtol=0, atol=1e-6)
    assert seen[-1] == 0.04 and len(seen) == len(steps) == 250
    assert len(drawn) == 249
    assert all(torch.equal(key, philox.make_key(3, step, "cpu")) for step, key in enumerate(drawn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_guided_sde_is_the_published_sampler_and_the_same_on_every_backend(dtype):
    """Whichever backend makes the step, against all of it in float64 with guidance combined outside."""
    ids = torch.tensor([5, 2, 7])
    noise = initial_noise(3, ids, (3, 4, 4)).to(dtype)
    seen = []

    def model(x, t, labels):
        seen.append(x.dtype)
        v = torch.tanh(x.double()) * (1 + t.double() + labels)[:, None, None, None] / 4 - 0.3
        return v.to(dtype).to(x.dtype).contiguous(memory_format=torch.channels_last), None

    config = SamplerConfig(num_steps=20)
    velocity = guided(model, torch.tensor([1, 2, 0]), 1.8, (0.2, 0.65), num_classes=3)
    latents = sample(velocity, noise, ids, 3, config)
    assert set(seen) == {dtype} and latents.dtype == dtype
    exact = sample(lambda x, t: velocity(x.to(dtype).double(), t), noise.double(), ids, 3, config)
    # bfloat16 rounds the state before the network, and a state on the edge of two values may go either way.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(latents.double(), exact, rtol=tolerance, atol=tolerance)
    with use_backend("reference"):
        torch.testing.assert_close(sample(velocity, noise, ids, 3, config), latents, rtol=tolerance, atol=tolerance)


def test_sde_last_step_is_deterministic():
    """From two steps, the first noisy and the last not: x_0 is the drift of the state that the first one left."""
    ids, noise = torch.arange(4), torch.randn(4, 1, 2, 2, dtype=torch.float64)
    states = []

    def velocity(x, t):
        states.append(x)
        return torch.zeros_like(x)

    result = sample(velocity, noise, ids, 0, SamplerConfig(num_steps=2))
    torch.testing.assert_close(result, states[1] - 0.04 * states[1])  # drift is x where the velocity is 0


@pytest.mark.parametrize(("kind", "evaluations"), [("euler", 10), ("heun", 19)])
def test_ode_evaluations(kind, evaluations):
    seen = []

    def velocity(x, t):
        seen.append(float(t))
        return torch.zeros_like(x)

    sample(velocity, torch.randn(2, 1, 2, 2), torch.arange(2), 3, SamplerConfig(kind=kind, num_steps=10))
    assert len(seen) == evaluations
    assert min(seen) == pytest.approx(0.1) and max(seen) == 1


@pytest.mark.parametrize("kind", ["sde", "heun"])
def test_a_sample_is_the_same_in_any_batch_and_on_any_rank(kind):
    config = SamplerConfig(kind=kind, num_steps=5)

    def draw(ids):
        ids = torch.tensor(ids)
        return sample(lambda x, t: torch.sin(x) - t * x, initial_noise(7, ids, (3, 4, 4)), ids, 7, config)

    together = draw([0, 1, 2, 3, 4, 5])
    for rank in range(2):
        assert torch.equal(draw(list(range(rank, 6, 2))), together[rank::2])
    assert torch.equal(draw([4, 1]), together[[4, 1]])
    assert not torch.equal(together[0], together[1])


def test_another_seed_gives_other_samples():
    ids, noise = start(1)
    one, other = (sample(gaussian_velocity, noise, ids, seed, SamplerConfig(num_steps=5)) for seed in (0, 1))
    assert not torch.equal(one, other)
    assert not torch.equal(initial_noise(0, ids, (2, 1, 1)), initial_noise(1, ids, (2, 1, 1)))


@pytest.mark.parametrize("kind", ["sde", "euler", "heun"])
def test_the_state_keeps_its_precision_while_the_network_sees_its_own(kind):
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(4)

    def velocity(x, t):
        assert x.dtype == noise.dtype or x.dtype == torch.float64
        return torch.full_like(x, 0.125)

    config = SamplerConfig(kind=kind, num_steps=200)
    result = sample(velocity, noise, ids, 0, config)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, sample(velocity, noise.double(), ids, 0, config).bfloat16())


def test_heun_guides_both_halves_of_a_step_or_neither():
    sizes = []

    def model(x, t, labels):
        sizes.append((round(float(t[0]), 3), len(x)))
        return torch.zeros_like(x), None

    velocity = guided(model, torch.tensor([0]), 2.0, (0.0, 0.75), 10)
    sample(velocity, torch.randn(1, 1, 2, 2), torch.arange(1), 0, SamplerConfig(kind="heun", num_steps=4))
    assert sizes == [(1.0, 1), (0.75, 1), (0.75, 2), (0.5, 2), (0.5, 2), (0.25, 2), (0.25, 2)]


def test_samples_that_are_not_finite_are_named():
    def velocity(x, t):
        return torch.where(torch.arange(3)[:, None, None, None] == 1, torch.nan, x)

    with pytest.raises(UserError, match=r"not finite for sample ids \[20\]"):
        sample(velocity, torch.randn(3, 1, 2, 2), torch.tensor([10, 20, 30]), 0, SamplerConfig(num_steps=3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "dopri5"},
        {"num_steps": 1},
        {"last_step": 0.0},
        {"last_step": 1.0},
        {"dtype": "bfloat16"},
        {"timestep_shift": 0.3},  # the default is the sde
        {"timestep_shift": 0.0, "kind": "euler"},
    ],
)
def test_config_refuses_what_cannot_run(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplerConfig(**wrong)
