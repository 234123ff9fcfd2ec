"""Stage 1: its losses, its loop, its checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import COMPARED, checkpoint_tensors, vae_config

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.export import write_diffusers
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.train.vae.networks import build_discriminator, build_model
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(few_images, tmp_path_factory):
    """A run of 40 steps on 8 pictures with every loss that needs no foreign weights."""
    run = tmp_path_factory.mktemp("runs") / "vae"
    config = vae_config(
        run,
        few_images,
        loop={"num_steps": 40},
        loss={"gan_start_step": 15, "gan_weight": 1e-3},
        discriminator_optimizer={"learning_rate": 2e-3},
    )
    assert train_vae(config) == 0
    return run


def test_overfitting_drives_every_loss_down(trained):
    logged = metrics(trained)
    for name, start in {"loss": 0, "reconstruction": 0, "align": 0, "discriminator": 15}.items():
        assert logged[-1][name] < 0.8 * logged[start][name], name


def test_gan_starts_at_its_step(trained):
    logged = metrics(trained)
    assert not {"gan", "discriminator"} & logged[14].keys()
    assert {"gan", "discriminator"} <= logged[15].keys()


def test_kl_falls_when_it_weighs_enough(images, tmp_path):
    train_vae(vae_config(tmp_path / "run", images, loop={"num_steps": 20}, loss={"kl_weight": 0.1, "gan_weight": 0.0}))
    logged = metrics(tmp_path / "run")
    assert max(entry["kl"] for entry in logged[:10]) > 2 * logged[-1]["kl"]


def test_lpips_falls_with_real_weights(images, tmp_path, test_data):
    weights = next((test_data / "weights" / "lpips_squeeze").rglob("squeeze.backbone.pth"))
    train_vae(
        vae_config(
            tmp_path / "run",
            images,
            loop={"num_steps": 60},
            alignment={"method": "none"},
            loss={
                "gan_weight": 0.0,
                "perceptual": {"net": "squeeze", "weights": str(weights)},
            },
        )
    )
    logged = metrics(tmp_path / "run")
    assert logged[-1]["lpips"] < 0.8 * logged[0]["lpips"]


def test_adaptive_gan_weight_and_l2_train(images, tmp_path):
    settings = {"gan_adaptive": True, "reconstruction": "l2"}
    assert train_vae(vae_config(tmp_path / "run", images, loop={"num_steps": 3}, loss=settings)) == 0
    assert all(entry["grad_norm"] is not None for entry in metrics(tmp_path / "run"))


def test_the_checkpoint_is_an_autoencoder_folder(trained):
    saved = load_autoencoder(trained / "checkpoints" / "step_00000040")
    assert saved.autoencoder.config.latent_channels == 4
    assert saved.latent_std.min() > 0 and saved.latent_std.isfinite().all()
    assert saved.autoencoder(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_preview_shows_originals_over_reconstructions(trained):
    from PIL import Image

    with Image.open(trained / "samples" / "reconstruction_00000040.png") as image:
        assert image.size == (8 * 34 - 2, 2 * 34 - 2)


def test_resume_equals_the_uninterrupted_run(images, tmp_path):
    train_vae(vae_config(tmp_path / "whole", images, loop={"num_steps": 5}))
    for stop in (2, 5):
        reading = {"num_threads": stop, "cache_mb": stop, "max_bad_fraction": 0.1 / stop}
        train_vae(vae_config(tmp_path / "parts", images, loop={"num_steps": stop}, data=reading))
    whole, parts = (checkpoint_tensors(tmp_path / name, 5) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and any("discriminator" in name for name in whole)
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name
    losses = [[entry["loss"] for entry in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_accumulation_equals_one_large_batch(images, tmp_path):
    """The discriminator's group norm and the running latent statistics aside, a step is a mean over the batch."""
    settings = {"loop": {"num_steps": 3}, "alignment": {"latent_norm": "none"}, **COMPARED}
    train_vae(vae_config(tmp_path / "one", images, **settings))
    train_vae(vae_config(tmp_path / "four", images, engine={"accumulation_steps": 4}, **settings))
    one, four = (checkpoint_tensors(tmp_path / name, 3) for name in ("one", "four"))
    for name in (name for name in one if name.startswith("model.safetensors")):
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=2e-5)


def test_finetuning_starts_from_the_given_weights_and_statistics(trained, images, tmp_path):
    config = vae_config(
        tmp_path / "run",
        images,
        init_from=str(trained),
        discriminator_from=str(trained),
        loop={"num_steps": 1},
        optimizer={"learning_rate": 1e-12},
        alignment={"latent_norm": "fixed"},
    )
    train_vae(config)
    before = load_file(trained / "checkpoints" / "step_00000040" / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "step_00000001" / "model.safetensors")
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-9)
    statistics = [
        load_autoencoder(path).latent_std
        for path in (
            trained / "checkpoints" / "step_00000040",
            tmp_path / "run" / "checkpoints" / "step_00000001",
        )
    ]
    assert torch.equal(*statistics)


def test_finetuning_starts_from_published_weights_and_a_discriminator(trained, images, tmp_path):
    source = trained / "checkpoints" / "step_00000040"
    saved = load_autoencoder(source)
    write_diffusers(tmp_path, saved, "source")
    config = vae_config(tmp_path / "run", images, init_from=str(tmp_path), discriminator_from=str(trained))
    model = build_model(config, None)
    weights = model.autoencoder.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in saved.autoencoder.state_dict().items())
    mean, std = model.latent_norm.statistics()
    assert torch.equal(mean, saved.latent_mean) and torch.equal(std, saved.latent_std)
    expected = load_file(source / "discriminator.safetensors")
    discriminator = build_discriminator(config, Distributed()).state_dict()
    assert all(torch.equal(discriminator[name], value) for name, value in expected.items())


def test_weights_of_other_sizes_than_the_settings_are_refused(trained, images, tmp_path):
    config = vae_config(
        tmp_path / "run", images, init_from=str(trained), loss={"gan_weight": 0.0}, autoencoder={"latent_channels": 5}
    )
    with pytest.raises(UserError, match="latent_channels 4 instead of 5"):
        build_model(config, None)
    # Settings left at their default ask for nothing.
    config.autoencoder = AutoencoderConfig()
    assert build_model(config, None).autoencoder.config.latent_channels == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": {"global_batch": 6}, "engine": {"accumulation_steps": 4}}, "multiple of ranks x accumulation"),
        ({"data": {"image_size": 64}}, "16 x 16"),
        ({"alignment": {"latent_norm": "fixed"}}, "needs init_from"),
        ({"init_from": "nowhere", "cold_discriminator": True}, "nowhere does not exist"),
        ({"discriminator_from": "no_critic.pt"}, "no_critic.pt does not exist"),
        ({"alignment": {"foundation": {"name": "dinov2-vit-b"}}}, "weights"),
        ({"optimizer": {"ema_decay": 0.99}}, "optimizer.ema_decay is for generators"),
    ],
)
def test_bad_settings_are_one_clear_line(images, tmp_path, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        train_vae(vae_config(tmp_path / "run", images, **settings))
    assert "\n" not in str(caught.value)
