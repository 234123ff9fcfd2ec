"""`sendvae plan` and `train ... --dry_run`: what they say, and that they leave nothing."""

import json

import pytest
import torch
from tiny_runs import SIT, VAE

from sendvae_fast.cli.main import main
from sendvae_fast.config import build_config
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.plan.fake_step import Surroundings, fake_step
from sendvae_fast.plan.memory import Memory, memory_of
from sendvae_fast.plan.plan import Planner
from sendvae_fast.plan.settings import PlanConfig
from sendvae_fast.train.sit.settings import SiTTrainConfig

pytestmark = pytest.mark.slow


def options(settings, prefix=""):
    """A nested config as options of the command line."""
    found = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += options(value, f"{prefix}{key}.")
        else:
            found.append(f"--{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return found


CASES = {"vae": VAE, "sit": SIT}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    torch.set_num_threads(1)
    return tmp_path


def plan(capsys, stage, *more):
    code = main(["plan", "train", stage, *options(CASES[stage]), "--engine.precision=bf16", "--json", *more])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_a_plan(capsys, elsewhere):
    found = plan(capsys, "sit", "--gpus=2", "--gpu=A100", "--price=2", "--latent=[4,8,8]")
    assert found["gpus"] == 2 and found["pictures_at_once"] == 4 and found["global_batch"] == 8
    memory = Memory(**found["memory"])
    assert memory.total == pytest.approx(found["memory_total"]) and found["fits"]
    assert found["largest_at_once"] > 4
    epochs = found["lengths"]["80 epochs"]
    assert epochs["steps"] == 80 * (1_281_167 // 8)
    assert epochs["hours"] == pytest.approx(epochs["steps"] * found["step_s"] / 3600)
    assert epochs["cost"] == pytest.approx(epochs["hours"] * 2 * 2)
    assert found["images_per_s"] == pytest.approx(8 / found["step_s"])
    assert found["latent_bytes"] == 1_281_167 * 4 * 8 * 8 * 4
    assert not list(elsewhere.iterdir())


def test_the_largest_batch_is_the_largest_that_fits():
    config = build_config(SiTTrainConfig, SIT | {"run": "x", "latents": "x"})
    machines = PlanConfig(gpu="A10", gpus=1, latent=(4, 8, 8))
    largest = Planner(config, machines).one().largest_at_once
    for size, fits in ((largest, True), (largest + 40, False)):
        step = fake_step(config, size, Surroundings(machines.num_classes, machines.latent))
        assert (memory_of(step, config.engine, 1).total <= machines.kind.memory_bytes) == fits


def test_a_sweep_is_a_table_of_more_and_more_gpus(capsys):
    assert main(["plan", "train", "sit", *options(SIT), "--engine.precision=bf16", "--latent=[4,8,8]", "--sweep"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["GPUs", "1", "2", "4", "8"]
    assert [row[1] for row in rows[1:]] == ["8", "4", "2", "1"]
    assert "Assumed, not measured:" in out


def test_a_batch_that_does_not_divide_is_refused(capsys):
    assert main(["plan", "train", "vae", *options(VAE), "--gpus=16"]) == 2
    assert "data.global_batch=8 must be a multiple of GPUs x accumulation steps = 16 x 1" in capsys.readouterr().err


def test_plans_are_of_training_runs(capsys):
    assert main(["plan", "sample", "--generator=x", "--autoencoder=y", "--out=z"]) == 2
    assert "plans are of training runs" in capsys.readouterr().err


def test_a_dry_run_names_all_that_is_missing_and_leaves_nothing(capsys, elsewhere):
    settings = [*options(VAE), "--run=runs/x", "--dry_run", "--init_from=nowhere", "--discriminator_from=neither"]
    assert main(["train", "vae", *settings, "--data.root=photos", "--engine.precision=bf16"]) == 2
    out, err = capsys.readouterr()
    for words in ("data.root: ", "init_from: nowhere does not exist", "discriminator_from: neither does not exist"):
        assert words in err
    assert "3 of 5 things that the run needs are missing or no good" in err
    assert "memory of a GPU" in out and not list(elsewhere.iterdir())


def test_a_dry_run_of_what_is_there(capsys, elsewhere):
    synth_scenes(elsewhere / "scenes", 24, size=32, seed=0)
    settings = [*options(VAE), "--run=runs/x", "--data.root=scenes", "--dry_run"]
    assert main(["train", "vae", *settings]) == 0
    out = capsys.readouterr().out
    assert "all 4 things that the run needs are there" in out and "of 24 pictures" in out
    assert [path.name for path in elsewhere.iterdir()] == ["scenes"]
