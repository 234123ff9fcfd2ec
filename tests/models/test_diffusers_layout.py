"""diffusers' names, shapes and configuration for our autoencoders, checked against diffusers itself."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL
from everything import in_turn
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder, Posterior
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.diffusers_layout import (
    from_diffusers,
    from_diffusers_config,
    to_diffusers,
    to_diffusers_config,
)

pytestmark = pytest.mark.slow

NARROW = {
    "f8": dict(channel_multipliers=(1, 2, 4, 4), attention_resolutions=(), latent_channels=4),
    "f16": dict(channel_multipliers=(1, 1, 2, 2, 4), attention_resolutions=(16,), latent_channels=6),
    "attention in two levels": dict(channel_multipliers=(1, 2, 2), attention_resolutions=(256, 128), num_res_blocks=1),
    "no attention": dict(channel_multipliers=(1, 2), attention_resolutions=(), mid_attention=False),
}


def narrow(name) -> Autoencoder:
    """Random weights, norms and biases included."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(base_channels=16, num_groups=8, **NARROW[name])).eval()
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return autoencoder


def config_entries(config):
    return to_diffusers_config(config, torch.zeros(config.latent_channels), torch.ones(config.latent_channels))


@pytest.mark.parametrize("name", NARROW)
def test_equals_diffusers_on_the_same_weights(name):
    ours = narrow(name)
    theirs = AutoencoderKL.from_config(config_entries(ours.config)).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), ours.config))
    x = torch.rand(2, 3, 48, 64) * 2 - 1  # not square, so that swapped axes show
    with torch.no_grad():
        moments = ours.encode(x)
        assert_close(moments, theirs.encode(x).latent_dist.parameters, rtol=1e-5, atol=1e-5)
        z = Posterior.from_moments(moments).mean
        assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-5, atol=1e-5)


def largest_difference(actual, expected):
    """Relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("preset", "image_size"), [
    (preset, image_size)
    for number, preset in enumerate(("f8d4", "f16d16", "f16d32", "f16d64"))
    for image_size in in_turn((256, 512), number)
])  # fmt: skip
def test_equals_diffusers_at_the_papers_sizes(preset, image_size):
    """Encoded to 3e-6 and decoded to 1e-4 of the largest value.

    Almost all of the latter is diffusers' own rounding, in PyTorch's float32 group norm over a few wide channels: in
    float64 it differs from our float32 by 2e-6 at most.
    """
    torch.manual_seed(0)
    config = dataclasses.replace(AutoencoderConfig.preset(preset), base_channels=8, num_groups=4)
    ours = Autoencoder(config).eval()
    theirs = AutoencoderKL.from_config(config_entries(config)).eval()
    latent_size = image_size // ours.downsampling
    x, z = torch.rand(1, 3, image_size, image_size) * 2 - 1, torch.randn(1, config.latent_channels, *[latent_size] * 2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        theirs.load_state_dict(to_diffusers(ours.state_dict(), config))
        moments, pictures = ours.encode(x), ours.decode(z)
        assert largest_difference(moments, theirs.encode(x).latent_dist.parameters) < 3e-6
        assert largest_difference(pictures, theirs.decode(z).sample) < 1e-4
        if image_size == 256 and preset == "f16d32":
            theirs.double()
            assert largest_difference(moments, theirs.encode(x.double()).latent_dist.parameters) < 2e-6
            assert largest_difference(pictures, theirs.decode(z.double()).sample) < 2e-6


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("old_names", [False, True], ids=["", "old attention names"])
def test_round_trip_keeps_every_bit(name, old_names):
    ours = narrow(name)
    state = ours.state_dict()
    theirs = to_diffusers(state, ours.config)
    if old_names:
        for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            theirs = {key.replace(f".{new}.", f".{old}."): value for key, value in theirs.items()}
    back = from_diffusers(theirs, from_diffusers_config(config_entries(ours.config)))
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("preset", ["f8d4", "f16d16", "f16d32", "f16d64"])
def test_presets_have_the_names_and_shapes_of_diffusers(preset):
    config = AutoencoderConfig.preset(preset)
    entries = config_entries(config)
    with torch.device("meta"):
        ours = to_diffusers(Autoencoder(config).state_dict(), config)
        theirs = AutoencoderKL.from_config(entries).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert from_diffusers_config(entries) == config


def test_reads_the_configuration_of_sd_vae():
    # As published: fewer fields than today's diffusers writes.
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    entries = dict(
        _class_name="AutoencoderKL",
        _diffusers_version="0.4.2",
        act_fn="silu",
        block_out_channels=[128, 256, 512, 512],
        in_channels=3,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=32,
        out_channels=3,
        sample_size=256,
        **blocks,
    )
    assert from_diffusers_config(entries) == AutoencoderConfig.preset("f8d4")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(_class_name="AutoencoderTiny"), "_class_name is 'AutoencoderTiny'"),
        (dict(in_channels=4), "in_channels is 4"),
        (dict(use_quant_conv=False), "use_quant_conv is False"),
        (dict(block_out_channels=[16, 24, 32, 32]), "not multiples of the first"),
        (dict(block_out_channels=[0, 16, 32, 32]), "not multiples of the first"),
        (dict(block_out_channels=[], down_block_types=[], up_block_types=[]), "not multiples of the first"),
        (dict(down_block_types=["DownEncoderBlock2D"] * 3), "not those of an LDM autoencoder"),
        (dict(up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3), "not those of an LDM autoencoder"),
    ],
)
def test_networks_of_another_kind_are_refused(changes, words):
    entries = config_entries(narrow("f8").config)
    with pytest.raises(ValueError, match=words):
        from_diffusers_config(entries | changes)


def test_sizes_without_an_equivalent_are_refused():
    with pytest.raises(UserError, match="no diffusers equivalent"):
        config_entries(AutoencoderConfig(channel_multipliers=(2, 4), attention_resolutions=()))
