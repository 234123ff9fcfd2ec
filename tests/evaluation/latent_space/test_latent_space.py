import math

import numpy as np
import pytest
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.latent_space.discrimination import discrimination
from sendvae_fast.evaluation.latent_space.learnability import velocity_loss_of_small_sit
from sendvae_fast.evaluation.latent_space.sensitivity import decoder_sensitivity
from sendvae_fast.evaluation.latent_space.settings import DiscriminationConfig, LearnabilityConfig, UniformityConfig
from sendvae_fast.evaluation.latent_space.spectrum import NUM_BANDS, band_powers
from sendvae_fast.evaluation.latent_space.uniformity import spread_of, uniformity


def test_spread_of_equal_densities_and_against_pairs():
    np.testing.assert_allclose(spread_of(np.full(50, 0.3)), (0, 0, 1), atol=1e-8)
    density = np.random.default_rng(0).uniform(size=40)
    variation, gini, entropy = spread_of(density)
    assert variation == pytest.approx(density.std() / density.mean())
    assert gini == pytest.approx(np.abs(density[:, None] - density).mean() / (2 * density.mean()))
    share = density / density.sum()
    assert entropy == pytest.approx(-(share * np.log(share)).sum() / np.log(40), abs=1e-7)


@pytest.mark.slow
def test_clumps_are_less_uniform_than_a_cloud():
    rng = np.random.default_rng(0)
    cloud = rng.uniform(-1, 1, size=(150, 3, 2, 2))
    clumps = cloud.copy()
    clumps[:100] = 1e-3 * clumps[:100] + 3
    config = UniformityConfig(num_runs=1)
    even, uneven = (uniformity(latents, config, 0) for latents in (cloud, clumps))
    assert uneven.gini[0] > even.gini[0] and uneven.entropy[0] < even.entropy[0]
    with pytest.raises(UserError, match="needs 100 pictures"):
        uniformity(cloud[:99], config, 0)


def test_one_gaussian_has_the_entropy_of_its_standardised_components():
    """They are uncorrelated with deviation 1 on all pictures: 3/2 (1 + ln 2π) nats, but for the tenth held out."""
    x = np.random.default_rng(0).normal(size=(5000, 3)) * [1, 5, 0.1]
    found = discrimination(x, DiscriminationConfig(components=(1,), num_dims=3), 0)
    assert found.nll[1] == pytest.approx(1.5 * (1 + math.log(2 * math.pi)), abs=0.02)
    assert found.explained == pytest.approx(1) and found.num_pictures == 4500
    assert abs(found.held_out_nll[1] - found.nll[1]) < 0.2
    with pytest.raises(UserError, match="a mixture of 50 Gaussians needs 500 pictures, not 100"):
        discrimination(x[:100], DiscriminationConfig(), 0)


def test_power_of_noise_and_of_a_wave():
    noise = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    frequency = np.abs(np.fft.fftfreq(16)) * 2
    radius = np.hypot(frequency[:, None], frequency)
    edges = np.append(np.arange(NUM_BANDS) / NUM_BANDS, 2)
    flat = np.histogram(radius, edges)[0] / 256
    np.testing.assert_allclose(band_powers([noise[:20], noise[20:]]), flat, atol=0.005)
    wave = torch.cos(2 * math.pi * 5 * torch.arange(16) / 16).expand(1, 1, 16, 16)
    assert band_powers([wave])[5].item() == pytest.approx(1)  # 5 / 8 of the highest frequency


def test_sensitivity_of_a_linear_decoder_is_its_norm():
    generator = torch.Generator().manual_seed(0)
    matrix, std = torch.randn(50, 2 * 4 * 4, generator=generator), torch.tensor([0.5, 3.0])
    z = torch.randn(300, 2, 4, 4, generator=generator)
    found = decoder_sensitivity(lambda z: z.flatten(1) @ matrix.T, [(torch.arange(300), z)], std, 0)
    scaled = matrix * std.repeat_interleave(16)
    for values in found.values():
        assert values.square().mean().item() == pytest.approx(scaled.square().sum().item() / 50, rel=0.1)
        torch.testing.assert_close(values, found[0.1], rtol=1e-3, atol=1e-3)
    halves = [(torch.arange(150), z[:150]), (torch.arange(150, 300), z[150:])]
    again = decoder_sensitivity(lambda z: z.flatten(1) @ matrix.T, halves, std, 0)
    torch.testing.assert_close(again[0.5], found[0.5])  # noise depends on the picture alone


@pytest.mark.slow
def test_noise_is_learnt_no_better_than_it_can_be_and_structure_is():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(600, 2, 4, 4)).astype(np.float16)
    smooth = np.broadcast_to(rng.normal(size=(600, 2, 1, 1)), noise.shape).astype(np.float16)
    config = LearnabilityConfig(num_steps=60, batch_size=32, depth=1, width=32, learning_rate=5e-3)
    losses = [
        velocity_loss_of_small_sit(latents[:300], latents[300:], config, 0, torch.device("cpu"))
        for latents in (noise, smooth)
    ]
    assert losses[0].shape == (300,) and losses[0].mean() > math.pi / 2 - 0.05
    assert losses[1].mean() < losses[0].mean() - 0.2
