"""The LDM autoencoder: published sizes and layout (the same numbers as diffusers': test_diffusers_layout.py)."""

import math

import pytest
import torch
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder, Posterior
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig

TINY = dict(base_channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, latent_channels=4, num_groups=4)


def tiny(**changes) -> Autoencoder:
    torch.manual_seed(0)
    sizes = {**TINY, "attention_resolutions": (16,), "nominal_resolution": 64, **changes}
    return Autoencoder(AutoencoderConfig(**sizes))


def num_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "name, parameters, tensors, downsampling",
    [
        ("f8d4", 83_653_863, 248, 8),
        ("f16d16", 69_610_963, 342, 16),
        ("f16d32", 69_836_067, 342, 16),
        ("f16d64", 70_293_955, 342, 16),
    ],
)
def test_presets_have_the_published_size(name, parameters, tensors, downsampling):
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig.preset(name))
        moments = autoencoder.encode(torch.empty(1, 3, 256, 256))
        images = autoencoder.decode(moments.chunk(2, dim=1)[0])
    assert num_parameters(autoencoder) == parameters
    assert len(autoencoder.state_dict()) == tensors
    assert autoencoder.downsampling == downsampling
    assert moments.shape == (1, 2 * autoencoder.config.latent_channels, 256 // downsampling, 256 // downsampling)
    assert images.shape == (1, 3, 256, 256)


@pytest.mark.parametrize(
    "name, encoder, decoder", [("f8d4", 34_163_592, 49_490_179), ("f16d32", 28_413_248, 41_417_603)]
)
def test_encoder_and_decoder_have_the_published_size(name, encoder, decoder):
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig.preset(name))
    assert (num_parameters(autoencoder.encoder), num_parameters(autoencoder.decoder)) == (encoder, decoder)


def test_default_config_is_f16d32():
    assert AutoencoderConfig() == AutoencoderConfig.preset("f16d32")


def test_state_dict_has_the_ldm_layout():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Autoencoder(AutoencoderConfig.preset("f16d32")).state_dict().items()}
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.1.block.0.norm1.weight": (128,),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.downsample.conv.weight": (256, 256, 3, 3),
        "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.conv_out.weight": (64, 512, 3, 3),
        "decoder.conv_in.weight": (512, 32, 3, 3),
        "decoder.mid.block_2.conv2.bias": (512,),
        # Index 0 is the highest resolution.
        "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
        "decoder.up.4.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.4.attn.2.norm.weight": (512,),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quant_conv.weight": (64, 64, 1, 1),
        "post_quant_conv.weight": (32, 32, 1, 1),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    for part in ("encoder.down.4.downsample", "decoder.up.0.upsample", "encoder.down.3.attn", "encoder.down.0.block.2"):
        assert not [key for key in shapes if key.startswith(part)]


def test_attention_follows_the_nominal_resolution_at_other_image_sizes():
    autoencoder = tiny()
    assert [len(stage.attn) for stage in autoencoder.encoder.down] == [0, 0, 1]
    assert [len(stage.attn) for stage in autoencoder.decoder.up] == [0, 0, 2]
    assert autoencoder(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_mid_attention_can_be_left_out():
    names = tiny(mid_attention=False, attention_resolutions=()).state_dict()
    assert not [name for name in names if "attn" in name]


def test_channels_last_gives_the_same_result_in_channels_last():
    autoencoder = tiny().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = autoencoder(x)
    actual = autoencoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_close(actual, expected)


def test_trains_every_weight_and_overfits_one_image():
    autoencoder = tiny()
    x = (torch.rand(1, 3, 4, 4) * 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)  # as fine as the latent
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (autoencoder(x) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The posterior mean ignores the log-variance half of quant_conv, so its gradient there is zero, not absent.
    assert all(parameter.grad is not None for parameter in autoencoder.parameters())
    assert losses[-1] < 0.25 * losses[0]


def test_posterior_splits_and_clamps():
    moments = torch.tensor([1.0, 2.0, -100.0, 100.0]).reshape(1, 4, 1, 1)
    posterior = Posterior.from_moments(moments)
    assert posterior.mean.flatten().tolist() == [1.0, 2.0]
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert posterior.std.flatten().tolist() == pytest.approx([math.exp(-15), math.exp(10)], rel=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_groups=3), "num_groups=3"),
        (dict(channel_multipliers=()), "channel_multipliers is empty"),
        (dict(latent_channels=0), "latent_channels is 0"),
        (dict(attention_resolutions=(15,)), r"\[15\]"),
        (dict(channel_multipliers=(1, 0, 2)), "level of 0 channels"),
    ],
)
def test_impossible_sizes_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tiny(**changes)


def test_unknown_preset_and_odd_image_are_refused():
    with pytest.raises(UserError, match="f8d4, f16d16, f16d32, f16d64"):
        AutoencoderConfig.preset("f4")
    with pytest.raises(UserError, match="30 x 32 pixels.*multiple of 4"):
        tiny().encode(torch.zeros(1, 3, 30, 32))


def test_differences_are_those_of_the_network():
    a = AutoencoderConfig(**TINY, attention_resolutions=(16,), nominal_resolution=64)
    assert a.differences(AutoencoderConfig(**TINY, attention_resolutions=(128,), nominal_resolution=512)) == []
    other = AutoencoderConfig(**TINY | {"latent_channels": 5}, attention_resolutions=(16, 32), nominal_resolution=64)
    assert a.differences(other) == [
        "latent_channels 4 instead of 5",
        "attention in levels [False, False, True] instead of [False, True, True]",
    ]
