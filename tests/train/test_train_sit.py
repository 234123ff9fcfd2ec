"""Stage 2: its losses, its loop, its checkpoints, and pictures from it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import COMPARED, NUM_IMAGES, VAE, cache_of, checkpoint_tensors, sit_config, vae_config

import sendvae_fast.train.sit.stage as train_sit_module
from sendvae_fast.cli.main import main
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.image_grid import save_grid
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.storage import load_autoencoder, save_autoencoder
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.ops import noise_inject, philox
from sendvae_fast.sampling.generate import LatentDecoder, generate
from sendvae_fast.train.sit.flow_losses import draw_noise_levels
from sendvae_fast.train.sit.settings import FlowConfig
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def autoencoder(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "vae"
    settings = {"alignment": {"method": "none"}, "loss": {"gan_weight": 0.0}}
    train_vae(vae_config(run, images, loop={"num_steps": 20}, **settings))
    return run


@pytest.fixture(scope="module")
def latents(autoencoder, images, tmp_path_factory):
    return cache_of(autoencoder, images, tmp_path_factory.mktemp("latents") / "cache")


def test_overfitting_drives_every_loss_down(few_images, autoencoder, tmp_path):
    latents = cache_of(autoencoder, few_images, tmp_path / "latents")
    settings = {"optimizer": {"learning_rate": 1e-2}, "loop": {"num_steps": 120}}
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


def next_command(printed):
    """What a finished run says to do next."""
    return printed.split("next: ")[1].splitlines()[0]


def test_the_next_command_draws_pictures_with_the_latents_own_autoencoder(
    images, latents, autoencoder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train_sit(sit_config(Path("run"), images, latents, loop={"num_steps": 1}))
    command = next_command(capsys.readouterr().err)
    weights = resolve_weights(autoencoder)
    assert command == f"sendvae sample --generator=run --out=run-samples --autoencoder={weights}"
    assert main([*command.split()[1:], "--num_samples=1", "--sampler.num_steps=2"]) == 0
    assert [path.name for path in tmp_path.glob("run-samples/*.png")] == ["000000.png"]
    monkeypatch.chdir(weights.parent)
    train_sit(sit_config(tmp_path / "run", images, latents, loop={"num_steps": 2}))
    assert next_command(capsys.readouterr().err).endswith(f"--autoencoder={weights.name}")


@pytest.mark.parametrize("recorded", [{}, {"autoencoder": None}, {"autoencoder": "/gone"}])
def test_the_next_command_asks_in_words_for_an_autoencoder_that_is_not_known(
    images, latents, tmp_path, capsys, recorded
):
    moved = tmp_path / "latents"
    shutil.copytree(latents, moved)
    note = json.loads((moved / "cache.json").read_text())
    del note["autoencoder"]
    (moved / "cache.json").write_text(json.dumps(note | recorded))
    train_sit(sit_config(tmp_path / "run", images, moved, loop={"num_steps": 1}))
    words = f"-samples, with --autoencoder= and the folder or run that made the latents {moved}"
    assert next_command(capsys.readouterr().err).endswith(words)


def test_preview_is_drawn_from_the_ema(images, latents, autoencoder, tmp_path):
    settings = {"optimizer": {"learning_rate": 0.1}, "loop": {"num_steps": 4, "preview_every": 2}}
    config = sit_config(tmp_path / "run", images, latents, autoencoder=str(autoencoder), **settings)
    train_sit(config)
    samples = tmp_path / "run" / "samples"
    assert sorted(file.name for file in samples.iterdir()) == ["samples_00000002.png", "samples_00000004.png"]
    for ema in (True, False):
        saved = load_sit(tmp_path / "run" / "checkpoints" / "step_00000004", ema=ema)
        decoder = LatentDecoder(load_autoencoder(resolve_weights(autoencoder)).autoencoder, *saved[1:3])
        [drawn] = generate(saved.sit, decoder, torch.arange(4), config.preview)
        save_grid(tmp_path / "grid.png", drawn.images, columns=2)
        same = (tmp_path / "grid.png").read_bytes() == (samples / "samples_00000004.png").read_bytes()
        assert same == ema


def test_an_autoencoder_of_other_latents_is_refused_before_the_first_step(images, latents, tmp_path):
    other = Autoencoder(AutoencoderConfig(**{**VAE["autoencoder"], "latent_channels": 3}))
    save_autoencoder(tmp_path / "vae", other, torch.zeros(3), torch.ones(3))
    with pytest.raises(UserError, match="decodes latents of 3 channels, but those of .* have 4"):
        train_sit(sit_config(tmp_path / "run", images, latents, autoencoder=str(tmp_path / "vae")))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_preview_that_guides_more_channels_than_there_are_is_refused_before_the_first_step(
    images, latents, autoencoder, tmp_path
):
    settings = {"autoencoder": str(autoencoder), "preview": {"guidance_channels": 5}, "loop": {"num_steps": 1}}
    with pytest.raises(UserError, match="guidance_channels is 5, but the generator's latents have 4"):
        train_sit(sit_config(tmp_path / "run", images, latents, **settings))
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_resume_equals_the_uninterrupted_run(images, latents, tmp_path):
    train_sit(sit_config(tmp_path / "whole", images, latents, loop={"num_steps": 5}))
    for stop, init_from in ((3, None), (5, str(tmp_path / "whole"))):
        otherwise = {
            "data": {"num_threads": stop, "cache_mb": stop, "max_bad_fraction": 0.1 / stop}, "init_from": init_from,
        }  # fmt: skip
        train_sit(sit_config(tmp_path / "parts", images, latents, loop={"num_steps": stop}, **otherwise))
    whole, parts = (checkpoint_tensors(tmp_path / name, 5) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and any("ema" in name for name in whole)
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


@pytest.fixture
def noised(monkeypatch):
    """What `noise_inject` was given and gave, in every micro-batch: (ids, mean, std, z)."""
    calls = []

    def record(mean, std, latent_mean, latent_std, key, ids, *args, **kwargs):
        output = noise_inject(mean, std, latent_mean, latent_std, key, ids, *args, **kwargs | {"need_z": True})
        calls.append((ids.clone(), mean.clone(), std.clone(), output.z))
        return output

    monkeypatch.setattr(train_sit_module, "noise_inject", record)
    return calls


def test_every_epoch_samples_the_posterior_anew(noised, images, latents, tmp_path):
    train_sit(sit_config(tmp_path / "run", images, latents, loop={"num_steps": 2 * NUM_IMAGES // 8}))
    ids, mean, std, z = (torch.cat(parts) for parts in zip(*noised, strict=True))
    order = ids.argsort(stable=True)
    assert ids[order].tolist() == sorted(2 * list(range(NUM_IMAGES)))  # two epochs
    first, second = (((z - mean) / std)[order[epoch::2]] for epoch in (0, 1))
    assert not torch.isclose(first, second).flatten(1).all(1).any()
    draws = torch.stack([first, second])
    deviation = draws.numel() ** -0.5
    assert draws.mean().abs() < 4 * deviation and (draws.var() - 1).abs() < 4 * 2**0.5 * deviation
    assert (first * second).mean().abs() < 4 * (draws.numel() / 2) ** -0.5


def test_labels_are_dropped_at_random(monkeypatch, images, latents, tmp_path):
    drops, forward = [], SiT.forward

    def record(self, z_t, t, labels, drop=None, **kwargs):
        drops.append(drop.clone())
        return forward(self, z_t, t, labels, drop, **kwargs)

    monkeypatch.setattr(SiT, "forward", record)
    settings = {"generator": {"label_dropout": 0.25}, "loop": {"num_steps": 30}}
    train_sit(sit_config(tmp_path / "run", images, latents, **settings))
    dropped = torch.stack(drops).double()  # [steps, B]
    assert (dropped.mean() - 0.25).abs() < 4 * (0.25 * 0.75 / dropped.numel()) ** 0.5
    assert dropped.mean(1).unique().numel() > 2  # not a whole batch at a time


def test_accumulated_micro_batches_equal_the_whole_batch(images, latents, tmp_path):
    settings = {"loop": {"num_steps": 3}, "optimizer": COMPARED["optimizer"]}
    for name, steps in (("one", 1), ("four", 4)):
        train_sit(sit_config(tmp_path / name, images, latents, engine={"accumulation_steps": steps}, **settings))
    one, four = (checkpoint_tensors(tmp_path / name, 3) for name in ("one", "four"))
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-4, atol=1e-6)


def test_logit_normal_noise_levels():
    key, ids = philox.make_key(3, 7), torch.arange(40_000)
    levels = draw_noise_levels(key, ids)
    logits = levels.double().logit()
    # Of 40,000 standard normal numbers the mean is off by 0.005 and the variance by 0.007, one standard deviation.
    assert logits.mean().abs() < 0.02 and (logits.var() - 1).abs() < 0.03
    assert ((logits < 1).double().mean() - 0.8413).abs() < 0.008
    assert torch.equal(draw_noise_levels(key, ids[5:9]), levels[5:9])
    assert not torch.equal(draw_noise_levels(philox.make_key(3, 8), ids), levels)


def test_when_noise_levels_are_uniform():
    flow = FlowConfig(noise_level="logit_normal", logit_normal_steps=10)
    assert [flow.is_uniform(step) for step in (9, 10)] == [False, True]
    assert FlowConfig().is_uniform(9)
    assert not FlowConfig(noise_level="logit_normal").is_uniform(10**7)


def test_lightningdits_recipe(images, latents, tmp_path):
    """Its network and losses in bf16, from a preset's switches to a folder that loads."""
    config = sit_config(
        tmp_path / "run", images, latents, repa={"weight": 0.0}, engine={"precision": "bf16"}, loop={"num_steps": 40},
        generator={"swiglu": True, "rms_norm": True, "rope": True, "qk_norm": True},
        flow={"noise_level": "logit_normal", "direction_weight": 1.0}, optimizer={"learning_rate": 1e-2},
    )  # fmt: skip
    train_sit(config)
    logged = metrics(tmp_path / "run")
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["velocity"] + entry["direction"], rel=1e-5)
    for name in ("velocity", "direction"):
        assert sum(entry[name] for entry in logged[-10:]) < 0.95 * sum(entry[name] for entry in logged[:10]), name
    sit = load_sit(tmp_path / "run" / "checkpoints" / "step_00000040").sit
    assert sit.config.swiglu and sit.config.rms_norm and sit.config.rope and sit.config.qk_norm


def test_latents_are_normalised_by_the_statistics_asked_for(images, latents, tmp_path):
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 2.0, 4.0])
    torch.save({"ema": {"bn.running_mean": mean, "bn.running_var": std**2}}, tmp_path / "repa_e.pt")
    settings = {"latent_stats": str(tmp_path / "repa_e.pt"), "loop": {"num_steps": 1}}
    train_sit(sit_config(tmp_path / "run", images, latents, **settings))
    saved = load_sit(tmp_path / "run" / "checkpoints" / "step_00000001")
    torch.testing.assert_close(saved.latent_mean, mean)
    torch.testing.assert_close(saved.latent_std, std)
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, tmp_path / "three.pt")
    with pytest.raises(UserError, match="3 means and 3 deviations"):
        train_sit(sit_config(tmp_path / "other", images, latents, latent_stats=str(tmp_path / "three.pt")))


def test_starts_from_the_weights_asked_for(images, latents, tmp_path):
    train_sit(sit_config(tmp_path / "first", images, latents, loop={"num_steps": 4}))
    settings = {"init_from": str(tmp_path / "first"), "optimizer": {"learning_rate": 1e-9}, "loop": {"num_steps": 1}}
    train_sit(sit_config(tmp_path / "second", images, latents, **settings, seed=1))
    before = load_sit(tmp_path / "first" / "checkpoints" / "step_00000004").sit.state_dict()  # the average
    for ema in (False, True):
        after = load_sit(tmp_path / "second" / "checkpoints" / "step_00000001", ema=ema).sit.state_dict()
        torch.testing.assert_close(after, before, rtol=0, atol=1e-8)
    with pytest.raises(UserError, match="has a generator of depth=2, but this run's has depth=1"):
        train_sit(sit_config(tmp_path / "third", images, latents, generator={"depth": 1}, **settings))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"generator": {"preset": "SiT-XL1"}}, "did you mean 'SiT-XL/1'"),
        ({"generator": {"preset": "lightningdit-xl/1"}}, "did you mean 'LightningDiT-XL/1'"),
        ({"repa": {"block": 3}}, "^repa.block=3 must be between 1 and depth=2"),
        ({"generator": {"preset": "SiT-B/1", "depth": None}, "repa": {"block": 13}}, "between 1 and depth=12"),
        ({"generator": {"width": 36, "num_heads": 2, "rope": True}}, "rope needs heads of a width"),
        ({"generator": {"patch_size": 0}}, "^generator.patch_size is 0"),
        ({"generator": {"depth": None}}, "generator.preset is null and generator.depth is missing"),
        # What is given goes before the preset's 6 heads.
        ({"generator": {"preset": "SiT-S/1", "width": None, "num_heads": 5}}, "^generator.width=384 .* num_heads=5"),
        ({"repa": {"weight": -1}}, "repa.weight is -1"),
        ({"flow": {"noise_level": "lognormal"}}, "logit_normal"),
        ({"flow": {"logit_normal_steps": 5}}, "flow.noise_level=logit_normal"),
        ({"flow": {"noise_level": "logit_normal", "logit_normal_steps": 0}}, "logit_normal_steps is 0"),
        ({"flow": {"direction_weight": -1}}, "direction_weight is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_data_is_opened(tmp_path, settings, words):
    with pytest.raises(UserError, match=words) as error:
        sit_config(tmp_path / "run", tmp_path / "none", tmp_path / "none", **settings)
    assert "\n" not in str(error.value)


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


def test_a_guided_preview_needs_label_dropout(images, latents, tmp_path):
    generator = {"label_dropout": 0.0}
    with pytest.raises(UserError, match="preview.guidance_scale is 2.5, but generator.label_dropout=0"):
        sit_config(tmp_path / "run", images, latents, generator=generator)
    sit_config(tmp_path / "run", images, latents, generator=generator, preview={"guidance_scale": 1.0})
