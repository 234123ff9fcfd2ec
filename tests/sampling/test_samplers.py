"""What the samplers visit, evaluate, draw and keep; `test_exact_problems.py` has where they arrive."""

import pytest
import torch
from exact_problems import gaussian_velocity, start

from sendvae_fast.errors import UserError
from sendvae_fast.ops import philox, use_backend
from sendvae_fast.sampling.guidance import guided
from sendvae_fast.sampling.samplers import initial_noise, sample, time_grid
from sendvae_fast.sampling.settings import SamplerConfig


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
def test_the_network_may_take_another_dtype_than_the_noise(kind):
    """The network's input is rounded, the state and what comes back are not."""
    ids, noise = start(4)
    seen = []

    def velocity(x, t):
        seen.append(x.dtype)
        return torch.full_like(x, 0.125)  # exact in bfloat16

    config = SamplerConfig(kind=kind, num_steps=20)
    result = sample(velocity, noise, ids, 0, config, network_dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16} and result.dtype == torch.float64
    if kind != "sde":  # whose noise is float32 with a float64 velocity only
        assert torch.equal(result, sample(velocity, noise, ids, 0, config))


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
        {"kind": "rk4"},
        {"num_steps": 1},
        {"last_step": 0.0},
        {"last_step": 1.0},
        {"dtype": "bfloat16"},
        {"timestep_shift": 0.3},  # the default is the sde
        {"timestep_shift": 0.0, "kind": "euler"},
        {"rtol": 0.0},
    ],
)
def test_config_refuses_what_cannot_run(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplerConfig(**wrong)
