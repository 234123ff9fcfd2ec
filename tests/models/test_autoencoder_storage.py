"""Autoencoder folders and published LDM weight files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.published import ldm_state
from sendvae_fast.models.autoencoder.storage import load_autoencoder, save_autoencoder
from sendvae_fast.models.weights import load_weights, read_weights

CONFIG = dict(
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_channels=3,
    num_groups=4,
)
MEAN, STD = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])


def load_ldm(target, path):
    """Into a network whose sizes are known: here norms have other groups than those that all published files have."""
    load_weights(target, ldm_state(read_weights(path), path), path)


def autoencoder(seed=0):
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderConfig(**CONFIG))


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_round_trip(tmp_path):
    # Channels-last, because safetensors wants contiguous tensors; twice, because saving again must replace.
    saved = autoencoder().to(memory_format=torch.channels_last)
    save_autoencoder(tmp_path / "a" / "b", autoencoder(seed=1), MEAN * 0, STD)
    save_autoencoder(tmp_path / "a" / "b", saved, MEAN, STD.double())
    loaded = load_autoencoder(tmp_path / "a" / "b")
    assert_same_weights(loaded.autoencoder, saved)
    assert loaded.autoencoder.config == saved.config and not loaded.autoencoder.training
    assert torch.equal(loaded.latent_mean, MEAN) and torch.equal(loaded.latent_std, STD)
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["config.json", "latent_stats.safetensors", "model.safetensors"]
    assert load_file(tmp_path / "a" / "b" / "model.safetensors").keys() == saved.state_dict().keys()


def test_weights_of_another_configuration_are_named(tmp_path):
    save_autoencoder(tmp_path, autoencoder(), MEAN, STD)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_res_blocks": 2, "channel_multipliers": [1, 3]}))
    with pytest.raises(UserError) as error:
        load_autoencoder(tmp_path)
    message = str(error.value)
    assert "\n" not in message and "model.safetensors" in message
    assert "missing (encoder.down.0.block.1.norm1.weight, " in message
    assert "encoder.down.1.block.0.conv1.weight 16x8x3x3 instead of 24x8x3x3" in message


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        load_autoencoder(tmp_path)
    save_autoencoder(tmp_path, autoencoder(), MEAN, STD)
    config = (tmp_path / "config.json").read_text()
    for text, words in (
        ("{", "config.json is damaged"),
        (json.dumps(json.loads(config) | {"depth": 3}), "no field 'depth'.*not an autoencoder configuration"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(config)
    save_file({"latent_mean": MEAN}, tmp_path / "latent_stats.safetensors")
    with pytest.raises(UserError, match="latent_std"):
        load_autoencoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors does not exist"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_published_ldm_file(tmp_path, wrapped):
    source, target = autoencoder(), autoencoder(seed=1)
    state = source.state_dict()
    if wrapped:
        leftovers = {"loss.logvar": torch.zeros(()), "foundation_model.model.norm.weight": torch.ones(2)}
        state = {"state_dict": {**state, **leftovers, "linear_proj.weight": torch.ones(2, 3)}, "global_step": 5}
    torch.save(state, tmp_path / "vae.pt")
    load_ldm(target, tmp_path / "vae.pt")
    assert_same_weights(source, target)


def test_published_file_with_foreign_keys_is_refused(tmp_path):
    torch.save({**autoencoder().state_dict(), "decoder.extra": torch.ones(1)}, tmp_path / "vae.pt")
    with pytest.raises(UserError, match=r"1 unexpected \(decoder.extra\)"):
        load_ldm(autoencoder(), tmp_path / "vae.pt")
