"""Run folders, checkpoints and latents written before a change of the code go on after it. See tests/old_runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import NUM_IMAGES

from sendvae_fast.config import build_config
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.engine.loggers import GROUPS
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.settings import VAETrainConfig
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

OLD_RUNS = Path(__file__).parents[1] / "old_runs"
LAST_STEP = 6  # of what the old code logged; its checkpoint is of step 3


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The old runs in a folder of the test's own, with their pictures, and that folder as the current one."""
    shutil.copytree(OLD_RUNS, tmp_path, dirs_exist_ok=True)
    synth_scenes(tmp_path / "scenes", NUM_IMAGES, size=32, seed=0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NOT_COMPARED = {"time_s", "learning_rate", "skipped_steps", *GROUPS["speed"]}
"""Of the machine, or not written then."""


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line.pop("step"): {k: v for k, v in line.items() if k not in NOT_COMPARED} for line in lines}


@pytest.mark.parametrize(
    ("name", "config_class", "train"),
    [("vae", VAETrainConfig, train_vae), ("sit", SiTTrainConfig, train_sit)],
    ids=["stage 1", "stage 2"],
)
def test_an_old_run_goes_on(old, name, config_class, train):
    """With its own config.yaml, from its own checkpoint, to the losses that the code of its day came to."""
    recorded = metrics_of(old / name)
    config = build_config(config_class, yaml.safe_load((old / name / "config.yaml").read_text()))
    assert config.loop.num_steps == LAST_STEP
    assert train(config) == 0
    resumed = metrics_of(old / name)
    assert list(resumed) == list(recorded) == list(range(1, LAST_STEP + 1))
    for step in range(4, LAST_STEP + 1):
        assert resumed[step] == pytest.approx(recorded[step], rel=1e-3, abs=1e-5), step


def test_old_weights_load(old):
    """As autoencoder and generator, from the run folders, and they give what has a finite value everywhere."""
    autoencoder = load_autoencoder(resolve_weights(old / "vae")).autoencoder
    sit = load_sit(resolve_weights(old / "sit")).sit
    with torch.no_grad():
        moments = autoencoder.encode(torch.zeros(1, 3, 32, 32))
        velocity, _ = sit(moments[:, :4], torch.tensor([0.5]), torch.tensor([3]))
    assert moments.shape == (1, 8, 8, 8) and velocity.shape == (1, 4, 8, 8)
    assert moments.isfinite().all() and velocity.isfinite().all()
