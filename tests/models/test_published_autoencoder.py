"""Importing autoencoders as others publish them, with random weights in every layout."""

import json
import os
import pickle

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.published import ldm_config
from sendvae_fast.models.autoencoder.storage import load_autoencoder, save_autoencoder

pytestmark = pytest.mark.slow

CONFIG = AutoencoderConfig(
    base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(128,), latent_channels=3
)
MEAN, STD = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.25, 2.0, 4.0])


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return Autoencoder(CONFIG).eval()


def repa_e_stats(path):
    shape = (1, 3, 1, 1)
    torch.save({"latents_scale": (1 / STD).view(shape), "latents_bias": MEAN.view(shape)}, path)


def assert_loads(path, source, mean=MEAN, std=STD, **options):
    saved = load_autoencoder(path, **options)
    expected, actual = source.state_dict(), saved.autoencoder.state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)
    assert saved.autoencoder.config == source.config and not saved.autoencoder.training
    assert_close(saved.latent_mean, mean, rtol=0, atol=0)
    assert_close(saved.latent_std, std, rtol=1e-7, atol=0)
    return saved


def ldm_files(state):
    """Published kinds of checkpoint around `state`."""
    averaged = {key: value + 1 for key, value in state.items()}
    vf = {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
        "foundation_model.model.norm.weight": torch.ones(2),
        "linear_proj.weight": torch.ones(2, 3),
        "model_ema.encoderconv_inweight": torch.ones(1),
    }
    prefixed = {f"first_stage_model.{key}": value for key, value in state.items()}
    generator = {"x_embedder.proj.weight": torch.ones(2), "encoder.other": torch.ones(1)}
    return {
        "bare": state,
        "va-vae": {"state_dict": {**state, **vf}, "global_step": 5, "epoch": 1},
        "whole latent diffusion": {"state_dict": {**prefixed, "model.diffusion_model.out.weight": torch.ones(2)}},
        "repa-e checkpoint": {
            "model": generator,
            "ema": generator,
            "vae": state,
            "opt": {"state": {}},
            "steps": 400_000,
            "discriminator": {"main.0.weight": torch.ones(4, 3, 4, 4)},
        },
        "model and ema": {"model": state, "ema": averaged},
        "only ema": {"ema": {f"module.{key}": value for key, value in state.items()}},
        "raw and averaged side by side": {
            **{f"ema.{k}": v for k, v in averaged.items()},
            **{f"module.{k}": v for k, v in state.items()},
        },
    }


@pytest.mark.parametrize("kind", ldm_files({}))
def test_every_kind_of_ldm_file(tmp_path, source, kind):
    torch.save(ldm_files(source.state_dict())[kind], tmp_path / "vae.pt")
    repa_e_stats(tmp_path / "vae-latents-stats.pt")
    saved = assert_loads(tmp_path / "vae.pt", source)
    assert saved.statistics_origin.endswith("vae-latents-stats.pt")


def test_ldm_safetensors_and_every_statistics_file(tmp_path, source):
    path = tmp_path / "vae.safetensors"
    save_file(source.state_dict(), path)
    with pytest.raises(UserError, match=r"no latent statistics.*--stats=FILE.*--scaling_factor=0.18215"):
        load_autoencoder(path)
    save_file({"latent_mean": MEAN, "latent_std": STD}, tmp_path / "latent_stats.safetensors")
    assert_loads(path, source)
    torch.save({"mean": MEAN.view(1, 3, 1, 1) + 1, "std": STD.view(1, 3, 1, 1)}, tmp_path / "latents_stats.pt")
    assert_loads(path, source, mean=MEAN + 1)
    assert_loads(path, source, stats=tmp_path / "latent_stats.safetensors")
    assert_loads(path, source, mean=torch.zeros(3), std=torch.full((3,), 1 / 0.18215), scaling_factor=0.18215)
    with pytest.raises(UserError, match="give one"):
        load_autoencoder(path, stats=path, scaling_factor=1.0)


@pytest.mark.parametrize("averaged", [False, True])
def test_statistics_of_repa_e_batch_norm(tmp_path, source, averaged):
    buffers = {"bn.running_mean": MEAN, "bn.running_var": STD**2, "bn.num_batches_tracked": torch.tensor(7)}
    other = {key: value * 2 for key, value in buffers.items()}
    content = (
        {"vae": source.state_dict(), "model": other, "ema": buffers} if averaged else {**source.state_dict(), **buffers}
    )
    torch.save(content, tmp_path / "vae.pt")
    saved = assert_loads(tmp_path / "vae.pt", source, std=STD)  # without eps, as REPA-E exports
    assert saved.statistics_origin == "batch norm bn in vae.pt"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_diffusers_folder(tmp_path, source, kind):
    theirs = diffusers_folder(tmp_path, safe_serialization=kind == "safetensors")
    saved = load_autoencoder(tmp_path)
    assert_close(saved.latent_mean, MEAN, rtol=0, atol=0)
    assert_close(saved.latent_std, STD, rtol=0, atol=0)
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        assert_close(saved.autoencoder(x), theirs(x).sample, rtol=1e-5, atol=1e-5)


def diffusers_folder(path, safe_serialization=True, **changes):
    """What diffusers itself saves, of random weights."""
    torch.manual_seed(1)
    sizes = dict(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=3,
        latents_mean=MEAN.tolist(),
        latents_std=STD.tolist(),
    )
    theirs = AutoencoderKL(**sizes | changes).eval()
    theirs.save_pretrained(path, safe_serialization=safe_serialization)
    return theirs


def test_scaling_factor_counts_unless_it_is_what_diffusers_fills_in(tmp_path):
    none = dict(latents_mean=None, latents_std=None)
    diffusers_folder(tmp_path / "sd", latent_channels=4, **none)
    saved = load_autoencoder(tmp_path / "sd")
    assert_close(saved.latent_std, torch.full((4,), 1 / 0.18215))
    assert saved.latent_mean.tolist() == [0.0] * 4
    diffusers_folder(tmp_path / "shifted", scaling_factor=0.5, shift_factor=0.25, **none)
    saved = load_autoencoder(tmp_path / "shifted")
    assert saved.latent_std.tolist() == [2.0] * 3 and saved.latent_mean.tolist() == [0.25] * 3
    diffusers_folder(tmp_path / "filled", **none)
    with pytest.raises(UserError, match="no latent statistics"):
        load_autoencoder(tmp_path / "filled")


@pytest.mark.parametrize("preset", ["f8d4", "f16d16", "f16d32", "f16d64"])
def test_sizes_are_told_by_the_shapes_of_the_weights(preset):
    config = AutoencoderConfig.preset(preset)
    with torch.device("meta"):
        assert ldm_config(Autoencoder(config).state_dict(), "vae.pt") == config


class Payload:
    """Unpickling an instance writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("name", ["vae.pt", "vae.ckpt", "diffusion_pytorch_model.bin", "vae-latents-stats.pt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_any_file_is_refused_and_not_run(tmp_path, source, name, legacy):
    sentinel, path = tmp_path / "sentinel", tmp_path / name
    content = {**source.state_dict(), "state": Payload(sentinel)}
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    if name.endswith(".bin"):
        diffusers_folder(tmp_path / "weights")
        (tmp_path / "config.json").write_bytes((tmp_path / "weights" / "config.json").read_bytes())
        path = tmp_path
    if "stats" in name:
        path = tmp_path / "vae.safetensors"
        save_file(source.state_dict(), path)
    with pytest.raises(UserError, match="more than tensors"):
        load_autoencoder(path)
    assert not sentinel.exists()


def bare(change):
    """A mistake in an LDM file's state dict."""
    return lambda state: torch.save(change(dict(state)), "vae.pt")


def stats(**content):
    """A mistake in the statistics file."""
    return lambda state: torch.save({k: torch.tensor(v) for k, v in content.items()}, "vae-latents-stats.pt")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            bare(lambda s: s | {"decoder.conv_out.weight": s["decoder.conv_out.weight"] * float("nan")}),
            r"vae.pt has NaN or inf in 1 weights \(decoder.conv_out.weight\)",
        ),
        (bare(lambda s: s | {"encoder.conv_in.weight": torch.ones(32, 4, 3, 3)}), "32x4x3x3 instead of 32x3x3x3"),
        (bare(lambda s: s | {"quant_conv.weight": torch.ones(8, 8, 1, 1)}), "quant_conv.weight 8x8x1x1 instead of"),
        (bare(lambda s: {k: v for k, v in s.items() if "up.1.attn" not in k}), "20 missing .decoder.up.1.attn.0"),
        (bare(lambda s: s | {"decoder.extra": torch.ones(1)}), r"1 unexpected \(decoder.extra\)"),
        (bare(lambda s: {"weight": torch.ones(1)}), "holds no autoencoder"),
        (bare(lambda s: {"encoder.conv_in.weight": torch.ones(())}), "lacks a convolution encoder.conv_in.weight"),
        (bare(lambda s: {"encoder.conv_in.weight": 3}), "lacks a convolution encoder.conv_in.weight"),
        (bare(lambda s: {"encoder.conv_in.weight": torch.ones(32, 3, 3, 3)}), "not an LDM autoencoder"),
        (
            bare(lambda s: {"encoder.conv_in.weight": torch.ones(32, 3, 3, 3), "encoder.down_blocks.0.x": s}),
            "in the diffusers layout: give the folder",
        ),
        (stats(mean=[0.0, 0.0], std=[1.0, 1.0]), "2 means and 2 deviations, but the latents have 3"),
        (stats(mean=[0.0] * 3, std=[1.0, 0.0, 1.0]), "not above 0"),
        (stats(mean=[0.0, float("nan"), 0.0], std=[1.0] * 3), "hold NaN"),
        (stats(scale=[1.0] * 3), "holds no latent statistics"),
    ],
)
def test_broken_ldm_files_are_named_in_one_line(tmp_path, source, monkeypatch, spoil, words):
    monkeypatch.chdir(tmp_path)
    torch.save(source.state_dict(), "vae.pt")
    repa_e_stats("vae-latents-stats.pt")
    spoil(source.state_dict())
    with pytest.raises(UserError, match=words) as error:
        load_autoencoder("vae.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(latent_channels=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "instead of 8x64x3x3"),
        (dict(layers_per_block=2), "missing"),
        (dict(latents_std=[1.0]), "3 means and 1 deviations"),
        (dict(latents_std=["a", "b", "c"]), "config.json is damaged, or no file of its kind"),
        (dict(block_out_channels="wide"), "config.json is damaged, or no file of its kind"),
        (dict(in_channels=4), "in_channels is 4 and only 3 is supported"),
        (dict(norm_num_groups=5), "num_groups=5"),
    ],
)
def test_diffusers_config_that_does_not_fit(tmp_path, changes, words):
    diffusers_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=words) as error:
        load_autoencoder(tmp_path)
    assert "\n" not in str(error.value)


def test_broken_diffusers_folders(tmp_path):
    diffusers_folder(tmp_path)
    config = (tmp_path / "config.json").read_text()
    entries = json.loads(config)
    del entries["latent_channels"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="no entry 'latent_channels'"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="has none of diffusion_pytorch_model.safetensors"):
        load_autoencoder(tmp_path)


def test_nan_in_our_own_folder(tmp_path, source):
    broken = Autoencoder(CONFIG)
    with torch.no_grad():
        broken.quant_conv.bias[0] = float("inf")
    save_autoencoder(tmp_path, broken, MEAN, STD)
    with pytest.raises(UserError, match=r"NaN or inf in 1 weights \(quant_conv.bias\)"):
        load_autoencoder(tmp_path)
