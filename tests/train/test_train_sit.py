"""Stage 2: its losses, its loop, its checkpoints, and pictures from it."""

import json

import pytest
import torch
from tiny_runs import cache_of, checkpoint_tensors, sit_config, vae_config

from sendvae_fast.errors import UserError
from sendvae_fast.models.sit_io import load_sit
from sendvae_fast.train.sit import train_sit
from sendvae_fast.train.vae import train_vae


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def autoencoder(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "vae"
    settings = {"alignment": {"weight": 0.0}, "loss": {"gan_weight": 0.0}}
    train_vae(vae_config(run, images, loop={"num_steps": 20}, **settings))
    return run


@pytest.fixture(scope="module")
def latents(autoencoder, images, tmp_path_factory):
    return cache_of(autoencoder, images, tmp_path_factory.mktemp("latents") / "cache")


def test_overfitting_drives_every_loss_down(few_images, autoencoder, tmp_path):
    latents = cache_of(autoencoder, few_images, tmp_path / "latents")
    settings = {"optimizer": {"learning_rate": 1e-2}, "loop": {"num_steps": 150}}
    train_sit(sit_config(tmp_path / "run", few_images, latents, **settings))
    logged = metrics(tmp_path / "run")
    for name in ("loss", "velocity", "align"):
        start, end = (sum(entry[name] for entry in part) / 20 for part in (logged[:20], logged[-20:]))
        assert end < 0.8 * start, name


def test_checkpoint_is_a_sit_folder_with_ema_and_statistics(images, latents, tmp_path):
    train_sit(sit_config(tmp_path / "run", images, latents, loop={"num_steps": 4}))
    folder = tmp_path / "run" / "checkpoints" / "step_00000004"
    raw, ema = load_sit(folder, ema=False), load_sit(folder)
    assert not torch.equal(raw.sit.final_layer.linear.weight, ema.sit.final_layer.linear.weight)
    note = json.loads((latents / "cache.json").read_text())
    assert raw.latent_std.tolist() == pytest.approx(note["latent_std"])


def test_preview_is_drawn_from_the_ema(images, latents, autoencoder, tmp_path):
    train_sit(sit_config(tmp_path / "run", images, latents, autoencoder=str(autoencoder), loop={"num_steps": 2}))
    assert (tmp_path / "run" / "samples" / "samples_00000002.png").stat().st_size > 0


def test_resume_equals_the_uninterrupted_run(images, latents, tmp_path):
    train_sit(sit_config(tmp_path / "whole", images, latents, loop={"num_steps": 5}))
    for stop in (3, 5):
        train_sit(sit_config(tmp_path / "parts", images, latents, loop={"num_steps": stop}))
    whole, parts = (checkpoint_tensors(tmp_path / name, 5) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and any("ema" in name for name in whole)
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_without_repa_no_picture_is_read(images, latents, tmp_path):
    """The latents alone feed a run without REPA, and training does not depend on how it is fed."""
    config = sit_config(tmp_path / "run", images, latents, repa={"weight": 0.0}, loop={"num_steps": 2})
    train_sit(config)
    assert all("align" not in entry for entry in metrics(tmp_path / "run"))
    assert not any("projectors" in name for name in checkpoint_tensors(tmp_path / "run", 2))


def test_latents_of_other_pictures_are_refused(images, latents, tmp_path):
    other = tmp_path / "other"
    for file in sorted(images.rglob("*.jpg"))[:10]:
        (other / "a").mkdir(parents=True, exist_ok=True)
        (other / "a" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="give the same images"):
        train_sit(sit_config(tmp_path / "run", other, latents, loop={"num_steps": 1}))
