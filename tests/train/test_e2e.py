"""REPA-E: whole steps against a plain version in float64, its checkpoints, and what they are good for afterwards."""

import copy

import pytest
import torch
from plain_e2e import NUM_STEPS, assert_equals_plain, batch_of, networks_of, plain_steps, stage_of
from tiny_runs import COMPARED_E2E, cache_of, checkpoint_tensors, e2e_config
from torch.testing import assert_close

from sendvae_fast import load_generator
from sendvae_fast.cli.convert import Config as Convert
from sendvae_fast.cli.convert import run as convert
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.ops import use_backend
from sendvae_fast.train.e2e.stage import train_e2e

pytestmark = pytest.mark.slow


def test_steps_equal_a_plain_version(tmp_path):
    settings = {"loss": {"kl_weight": 1e-3}, "generator": {"label_dropout": 0.4}, "engine": {"name": "ddp"}}
    stage = stage_of(tmp_path, **settings, **COMPARED_E2E)
    before = networks_of(stage)
    with use_backend("reference"):
        truth = plain_steps(stage)
    for step in range(NUM_STEPS):
        stage.train_step(step, batch_of(step))
    assert_equals_plain(stage, truth, before)


def test_parts_of_a_batch_train_what_the_whole_does(tmp_path):
    stages = [stage_of(tmp_path, engine={"accumulation_steps": num}, **COMPARED_E2E) for num in (1, 2)]
    for step in range(2):
        logged = [stage.train_step(step, batch_of(step)) for stage in stages]
        for name, value in logged[0].items():
            assert_close(torch.as_tensor(logged[1][name]), torch.as_tensor(value), rtol=1e-3, atol=1e-5, msg=name)
    for one, two in zip(stages[0].sit.state_dict().values(), stages[1].sit.state_dict().values(), strict=True):
        assert_close(two, one, rtol=1e-3, atol=2e-5)


def test_a_step_with_nan_changes_nothing(tmp_path):
    stage = stage_of(tmp_path, engine={"name": "ddp"})
    stage.train_step(0, batch_of(0))
    stage.generator.num_skipped = stage.engine.num_skipped = 0
    before = [copy.deepcopy(part.full_state("model")) for part in (stage.engine, stage.generator)]
    with torch.no_grad():
        weight = stage.model.autoencoder.decoder.conv_in.weight
        kept = weight[0, 0, 0, 0].clone()
        # Reaches the autoencoder's loss, and through the latents' moments nothing of the generator's.
        weight[0, 0, 0, 0] = torch.nan
    stage.train_step(1, batch_of(1))
    with torch.no_grad():
        weight[0, 0, 0, 0] = kept
    assert stage.engine.num_skipped == 1 and stage.generator.num_skipped == 0
    for name, value in stage.engine.full_state("model").items():
        assert torch.equal(value, before[0][name]), name

    with torch.no_grad():
        stage.sit.final_layer.linear.weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in stage.sit.bn.state_dict().items()}
    stage.train_step(2, batch_of(2))
    assert stage.generator.num_skipped == 1
    for name, value in stage.sit.bn.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("e2e") / "run"
    train_e2e(e2e_config(path, images, loop={"num_steps": 5}))
    return path


def test_resume_equals_the_uninterrupted_run(run, images, tmp_path):
    for stop in (3, 5):
        train_e2e(e2e_config(tmp_path / "parts", images, loop={"num_steps": stop}))
    whole, parts = checkpoint_tensors(run, 5), checkpoint_tensors(tmp_path / "parts", 5)
    assert whole.keys() == parts.keys() and "latent_norm.safetensors:bn.ema_var" in whole
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_a_run_is_an_autoencoder_and_a_generator(run, images, tmp_path):
    folder = run / "checkpoints" / "step_00000005"
    saved, sit = load_autoencoder(folder), load_sit(folder)
    tensors = checkpoint_tensors(run, 5)
    for kept in (saved, sit):
        assert_close(kept.latent_mean, tensors["latent_norm.safetensors:bn.ema_mean"])
        assert_close(kept.latent_std, tensors["latent_norm.safetensors:bn.ema_var"].sqrt())
    latents = cache_of(run, images, tmp_path / "latents")
    assert (latents / "cache.json").is_file()
    generator = load_generator(run)
    assert sorted(file.name for file in (run / "samples").iterdir()) == [
        "reconstruction_00000005.png", "samples_00000005.png",
    ]  # fmt: skip
    assert generator is not None


def test_the_autoencoder_goes_to_diffusers(run, tmp_path):
    convert(Convert(source=str(run), to="diffusers", out=str(tmp_path / "vae")))
    card = (tmp_path / "vae" / "README.md").read_text()
    assert "through a generator (REPA-E), weight 1.5" in card and "5 steps of 8 pictures" in card


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"repa": {"weight": 0.0}}, "must be above 0: without alignment nothing of the generator reaches"),
        ({"generator_optimizer": {"ema_decay": None}}, "generator_optimizer.ema_decay is null"),
        ({"engine": {"zero_stage": 3}}, "zero_stage=3 splits the generator's weights"),
        ({"repa": {"block": 3}}, "repa.block=3 must be between 1 and depth=2"),
        ({"generator": {"patch_size": 3}}, "times generator.patch_size=3"),
        ({"generator": {"patch_size": 2}}, "gives 8 x 8 .* latents give 4 x 4"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(settings, words, images, tmp_path):
    with pytest.raises(UserError, match=words):
        train_e2e(e2e_config(tmp_path / "run", images, loop={"num_steps": 1}, **settings))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
