"""A device without memory left: the advice has the planner's numbers, of the run and of each setting that it names."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import VAE

from sendvae_fast.cli.main import main
from sendvae_fast.config import load_config, merge, parse_overrides
from sendvae_fast.plan import plan
from sendvae_fast.plan.plan import Planner
from sendvae_fast.plan.settings import PlanConfig
from sendvae_fast.train.vae.settings import VAETrainConfig
from sendvae_fast.train.vae.stage import VAEStage

pytestmark = pytest.mark.slow
GIB = 2**30


def remembered(fake_step):
    """The same, without pretending a step again that the advice has pretended: a second each."""
    found = {}

    def step(config, num_pictures, around):
        key = config.engine.recompute, config.engine.precision, config.engine.accumulation_steps, num_pictures
        if key not in found:
            found[key] = fake_step(config, num_pictures, around)
        return found[key]

    return step


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A run whose device has no memory left at its first step."""

    step, calls = VAEStage.train_step, []

    def exhausted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:  # the others are the planner's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(*arguments)

    monkeypatch.setattr(VAEStage, "train_step", exhausted)
    monkeypatch.setattr(plan, "fake_step", remembered(plan.fake_step))
    monkeypatch.setattr(plan, "MAX_ON_A_GPU", 24)  # a search that needs one step more
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    torch.set_num_threads(1)
    (tmp_path / "pictures" / "grey").mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (256, 256), (number, number, number)).save(tmp_path / "pictures" / "grey" / f"{number}.jpg")
    settings = {"data": {"image_size": 256, "root": str(tmp_path / "pictures")}, "alignment": {"method": "none"}}
    settings |= {"autoencoder": {"channel_multipliers": [1, 2]}}
    settings |= {"loss": {"perceptual": None, "gan_weight": 0.0}, "engine": {"precision": "fp32"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(merge(VAE, settings)))
    return ["train", "vae", "--config", str(tmp_path / "run.yaml"), f"--run={tmp_path / 'run'}"]


def test_an_exhausted_device_names_planned_numbers(command, capsys):
    """Each number is what `sendvae plan` says of the run with that setting."""
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: rank 0 has no memory left on cpu: try, in this order, ")
    assert said.endswith("the same command goes on from the newest checkpoint")
    found = re.search(
        r"by the plan it takes (\S+) of the (\S+) GiB of a H100 with (\d+) pictures at once, (\S+) pictures", said
    )
    assert found, said
    takes, room, at_once, fit = found.groups()
    others = dict(re.findall(r"; with (\S+) (\S+) GiB", said))
    assert list(others) == ["engine.accumulation_steps=2", "engine.recompute=true", "engine.precision=bf16"]

    assert main(["plan", *command, "--gpus=1", "--gpu=H100", "--json"]) == 0
    now = json.loads(capsys.readouterr().out)
    assert (takes, room) == (f"{now['memory_total'] / GIB:.2f}", f"{80e9 / GIB:.2f}")
    assert (int(at_once), int(fit.replace(",", ""))) == (now["pictures_at_once"], now["largest_at_once"])
    for setting, planned in others.items():
        config = load_config(VAETrainConfig, [Path(command[3])], parse_overrides([*command[4:], f"--{setting}"]))
        assert planned == f"{Planner(config, PlanConfig(gpus=1)).memory().total / GIB:.2f}"
    assert len({takes, *others.values()}) == 4  # so that a number of another setting would be seen


def test_a_plan_that_fails_does_not_hide_the_error(command, capsys, monkeypatch):
    monkeypatch.setattr(Planner, "one", lambda self: 1 / 0)
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "rank 0 has no memory left" in said and "by the plan" not in said
