"""DDPM and DDIM on a problem with a closed form: data of one normal distribution, whose noise is known exactly."""

import pytest
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.models.diffusion import Diffusion
from sendvae_fast.models.sit.sizes import DIFFUSION_STEPS
from sendvae_fast.sampling.guidance import guided
from sendvae_fast.sampling.samplers import initial_noise, sample
from sendvae_fast.sampling.settings import SamplerConfig

MEAN, STD = 1.5, 0.5
SHAPE = (2, 4, 4)


class KnownNoise:
    """E[ε | z_t] for data N(MEAN, STD²), at the steps of training; the variance that is learned lies at `share`."""

    def __init__(self, share: float = 0.0) -> None:
        self.alpha_bar, self.share, self.seen = Diffusion.of().alpha_bar, share, []

    def __call__(self, x, step, labels=None):
        alpha_bar = self.alpha_bar[int(step.flatten()[0])].to(x)
        self.seen.append(int(step.flatten()[0]))
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        noise = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * MEAN) / variance
        output = torch.cat([noise, torch.full_like(noise, self.share)], dim=1)
        return output if labels is None else (output, None)


def draw(kind, num_steps, ids, network=None, **options):
    config = SamplerConfig(kind=kind, num_steps=num_steps)
    return sample(network or KnownNoise(), initial_noise(0, ids, SHAPE), ids, 0, config, **options)


@pytest.mark.parametrize("kind, num_steps", [("ddpm", 250), ("ddim", 250)])
def test_data_of_one_normal_distribution_come_out(kind, num_steps):
    x = draw(kind, num_steps, torch.arange(600)).double()
    num = x.numel()
    # DDIM is an ODE of first order in the steps; a mean of `num` draws varies by STD / sqrt(num).
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * STD / num**0.5 + 0.01)
    assert float(x.std()) == pytest.approx(STD, abs=4 * STD / (2 * num) ** 0.5 + 0.01)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_a_sample_is_the_same_in_any_batch(kind):
    whole = draw(kind, 5, torch.arange(6))
    assert torch.equal(draw(kind, 5, torch.arange(4, 6)), whole[4:])


def test_the_network_is_told_the_steps_of_training():
    network = KnownNoise()
    draw("ddpm", 5, torch.arange(1), network)
    assert network.seen == [999, 749, 500, 250, 0]


def test_ddim_in_two_steps_is_what_its_formula_gives():
    network, ids = KnownNoise(), torch.arange(2)
    z = initial_noise(0, ids, SHAPE).double()
    alpha_bar = network.alpha_bar
    noise = network(z, torch.tensor(999.0))[:, :2]
    latent = (z - (1 - alpha_bar[999]).sqrt() * noise) / alpha_bar[999].sqrt()
    z = alpha_bar[0].sqrt() * latent + (1 - alpha_bar[0]).sqrt() * noise
    noise = network(z, torch.tensor(0.0))[:, :2]
    truth = (z - (1 - alpha_bar[0]).sqrt() * noise) / alpha_bar[0].sqrt()
    found = draw("ddim", 2, ids, network_dtype=torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)


def test_guidance_leaves_the_variance_and_the_other_channels_alone():
    """As DiT guides: the first channels of the noise, here one of two, in an interval of step / 1000."""

    def network(x, step, labels):
        by_label = labels.float()[:, None, None, None].expand(-1, 4, *x.shape[2:])
        return by_label * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None], None

    velocity = guided(network, torch.tensor([1]), 3.0, (0.2, 0.6), num_classes=2, channels=1)
    x = torch.zeros(1, *SHAPE)
    inside = velocity.decide_at(500 / DIFFUSION_STEPS)(x, torch.tensor(500.0))
    assert inside[0, :, 0, 0].tolist() == [2 + 3 * (1 - 2), 2, 3, 4]
    outside = velocity.decide_at(700 / DIFFUSION_STEPS)(x, torch.tensor(700.0))
    assert outside[0, :, 0, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"kind": "ddpm", "num_steps": 1001}, "1000 steps at most"),
        ({"kind": "ddim", "num_steps": 1}, "num_steps is 1"),
        ({"kind": "ddpm", "timestep_shift": 0.5}, "euler and heun shift"),
    ],
)
def test_settings_that_no_sampler_has_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        SamplerConfig(**settings)
