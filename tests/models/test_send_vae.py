"""Latent statistics against torch's batch norm, and what each mapper is given."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.mappers.linear_mapper import LinearMapper
from sendvae_fast.models.mappers.mapper_config import MapperConfig
from sendvae_fast.models.mappers.mlp_mapper import MLPMapper
from sendvae_fast.models.mappers.transformer_mapper import Mapper
from sendvae_fast.models.noise_injection import NoiseInjection
from sendvae_fast.models.send_vae import SendVAE
from sendvae_fast.ops import noise_inject, philox


def test_running_statistics_are_batch_norms():
    """Of latents without posterior noise, from the second batch on: the first one sets ours."""
    torch.manual_seed(0)
    ours, theirs = NoiseInjection(3), nn.BatchNorm2d(3, eps=1e-4, momentum=0.1, affine=False)
    for step in range(4):
        z = torch.randn(64, 3, 8, 8) * torch.tensor([0.01, 1.0, 5.0]).view(3, 1, 1) + step
        ours.update(z, torch.full_like(z, -30.0))
        theirs.momentum = 0.1 if step else 1.0
        theirs(z)
    mean, std = ours.statistics()
    assert_close(mean, theirs.running_mean)
    # Theirs is the unbiased variance of 64 * 64 numbers.
    assert_close(std, (theirs.running_var + 1e-4).sqrt(), rtol=2e-4, atol=0)


def test_the_posteriors_variance_counts():
    norm = NoiseInjection(1)
    norm.update(torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 4.0).log())
    assert_close(norm.statistics()[1], torch.tensor([2.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["running", "fixed"])
def test_statistics_come_out_as_they_went_in(kind):
    torch.manual_seed(0)
    std = torch.cat([torch.logspace(-6, 6, 50), torch.rand(50)])
    mean = torch.randn(100)
    norm = NoiseInjection(100, kind)
    for _ in range(3):
        norm.set_statistics(mean, std)
        again = norm.statistics()
        assert torch.equal(again[0], mean) and torch.equal(again[1], std)
        mean, std = again
    norm.load_state_dict(norm.state_dict())
    assert torch.equal(norm.statistics()[1], std)


def test_kind_none_leaves_latents_alone():
    norm = NoiseInjection(2, "none")
    norm.set_statistics(torch.ones(2), torch.full((2,), 7.0))
    assert norm.statistics()[0].tolist() == [0, 0] and norm.statistics()[1].tolist() == [1, 1]


TINY = AutoencoderConfig(
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_channels=4,
    num_groups=4,
)
MAPPERS = {
    "send": lambda: Mapper(
        MapperConfig(
            latent_channels=4, grid_size=4, target_dim=10, width=24, num_heads=3, projector_width=16, patch_size=2
        )
    ),
    "send without noise": lambda: Mapper(
        MapperConfig(
            latent_channels=4, grid_size=4, target_dim=10, width=24, num_heads=3, projector_width=16, patch_size=2
        ),
        noise=False,
    ),
    "va": lambda: LinearMapper(4, 10, patch_size=2),
    "reals": lambda: MLPMapper(4, 10, width=16, patch_size=2),
}


@pytest.mark.parametrize("method", MAPPERS)
def test_each_mapper_sees_its_latents(method):
    """Features written out from the moments: noised, normalised or neither, 2 x 2 latents per token, row-major."""
    torch.manual_seed(0)
    model = SendVAE(Autoencoder(TINY), MAPPERS[method](), "fixed").eval()
    model.latent_norm.set_statistics(torch.randn(4), torch.rand(4) + 0.5)
    x, key, ids = torch.randn(3, 3, 16, 16), philox.make_key(0, 1, "cpu"), torch.arange(3)
    output = model(x, key, ids)
    mean, logvar = output.moments.chunk(2, dim=1)
    t = None if method == "send" else torch.zeros(3)
    latents = noise_inject(mean, logvar, *model.latent_norm.statistics(), key, ids, t)
    seen = latents.z if method == "va" else latents.z_t
    patches = nn.functional.unfold(seen, 2, stride=2).mT  # [B, 16, 4 * 2 * 2]
    if method == "va":
        expected = patches @ model.mapper.proj.weight.flatten(1).T
        assert model.mapper.proj.bias is None
    else:
        expected = model.mapper(patches)
    assert output.features.shape == (3, 16, 10)
    assert_close(output.features, expected, rtol=1e-5, atol=1e-5)
    assert_close(output.reconstruction, model.autoencoder.decode(latents.z))
    output.features.square().sum().backward()
    assert model.autoencoder.encoder.conv_in.weight.grad.abs().max() > 0
    assert model.autoencoder.decoder.conv_in.weight.grad is None
