"""The pictures of a tiny training run, its config, and two hosts to run it on."""

import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_jobs import NUM_STEPS, ROOT, SETTINGS, STEP_TIMEOUT_S
from two_hosts import TwoHosts


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A picture of each of 24 classes, and the config of a tiny autoencoder in training on them."""
    sys.path.append(str(ROOT / "tests" / "train"))
    from tiny_runs import VAE

    folder = tmp_path_factory.mktemp("photos")
    for name in range(24):
        (folder / "train" / f"{name:02}").mkdir(parents=True)
        pixels = np.random.default_rng(name).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{name:02}" / "a.png")
    settings = {
        **VAE,
        "loop": {**VAE["loop"], "num_steps": NUM_STEPS, "save_every": 10, "step_timeout_s": STEP_TIMEOUT_S},
    }
    settings["data"] = {**VAE["data"], "root": str(folder / "train")}
    settings["logging"] = {"to": []}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def in_checkout(monkeypatch):
    """The environment of jobs: the working folder is the checkout."""
    monkeypatch.chdir(ROOT)
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)


@pytest.fixture
def hosts(in_checkout, tmp_path):
    """Two hosts without a batch system."""
    with TwoHosts(tmp_path / "hosts") as both:
        yield both


@pytest.fixture
def slurm(in_checkout, tmp_path):
    """Two hosts under Slurm."""
    with TwoHosts(tmp_path / "hosts", slurm=True) as both:
        yield both
