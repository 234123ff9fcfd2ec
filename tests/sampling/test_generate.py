"""Settings of a job that reach the network, on a tiny SiT with random weights and a decoder that shows the latents."""

import pytest
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.models.sit import SiT
from sendvae_fast.models.sit_config import SiTConfig
from sendvae_fast.sampling.generate import GenerateConfig, generate
from sendvae_fast.sampling.samplers import SamplerConfig


def latents(**settings):
    """[B, C, H, H]: what the decoder is given in one Euler step, so that every channel shows its own guidance alone."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig(latent_size=4, latent_channels=5, patch_size=2, width=16, depth=1, num_heads=2, num_classes=3))
    for parameter in sit.parameters():  # a new SiT gives 0
        torch.nn.init.normal_(parameter, std=0.2)
    euler = SamplerConfig(kind="euler", num_steps=1)
    config = GenerateConfig(guidance_interval=(0.0, 1.0), sampler=euler, **settings)
    seen = []
    list(generate(sit, lambda z: seen.append(z) or z[:, :3], torch.arange(4), config))
    [only] = seen
    return only


def test_guidance_of_the_first_channels():
    unguided, all_guided = latents(guidance_scale=1.0), latents(guidance_scale=2.5)
    some_guided = latents(guidance_scale=2.5, guidance_channels=3)
    # A batch of 8 may round otherwise than one of 4.
    torch.testing.assert_close(some_guided[:, 3:], unguided[:, 3:])
    assert torch.equal(some_guided[:, :3], all_guided[:, :3])
    assert not torch.isclose(all_guided, unguided, rtol=1e-2).all(dim=(0, 2, 3)).any()
    assert torch.equal(latents(guidance_scale=2.5, guidance_channels=5), all_guided)


def test_more_guided_channels_than_the_latent_has_are_refused():
    with pytest.raises(UserError, match="guidance_channels is 6, but the generator's latents have 5"):
        latents(guidance_channels=6)
