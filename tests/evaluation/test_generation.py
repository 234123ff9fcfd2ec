"""What `evaluate generation` is given is looked at before any network is loaded."""

import numpy as np
import pytest
import yaml
from PIL import Image

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation import generation
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.evaluation.generation import evaluate_generation
from sendvae_fast.evaluation.settings import GenerationConfig


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def load(*_args):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(generation, "load_features", load)


@pytest.fixture
def folders(tmp_path):
    for name, num in (("samples", 3), ("reference", 3), ("lone", 1)):
        (tmp_path / name).mkdir()
        for number in range(num):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{number:06d}.png")
    return tmp_path


def evaluate(folders, samples="samples", reference="reference", **features):
    config = GenerationConfig(
        samples=str(folders / samples), reference=str(folders / reference), features=FeaturesConfig(**features)
    )
    evaluate_generation(config, say=lambda line: None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "inception"}, "features of inception need its weights: weights-inception-2015-12-05-6726825d.pth"),
        ({"name": "dinov2-vit-l", "weights": "none.pth"}, "not at none.pth: .*dinov2"),
        ({"name": "incepton"}, "no features .incepton.: did you mean inception?"),
        ({"name": "dinov9"}, "unknown foundation model 'dinov9'"),
        ({"name": "demo", "samples": "none"}, "none"),
        ({"name": "demo", "reference": "none"}, "none"),
        ({"name": "demo", "reference": "none.npz"}, "cannot read .*none.npz"),
        ({"name": "demo", "samples": "lone"}, "too few samples pictures .1. for a covariance: give at least 2"),
        ({"name": "demo", "reference": "small.npz"}, "too few reference pictures .1."),
    ],
)
def test_what_is_missing_or_too_little_is_said_first(folders, given, said):
    np.savez(folders / "small.npz", arr_0=np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=said):
        evaluate(folders, **given)


def test_an_unfinished_folder_of_samples_is_no_sample(folders):
    (folders / "samples" / "settings.yaml").write_text(yaml.safe_dump({"num_samples": 50_000}))
    with pytest.raises(UserError, match="has 3 of the 50,000 pictures"):
        evaluate(folders, name="demo")


def test_samples_come_from_one_place(tmp_path):
    for places in ({}, {"samples": "a", "generator": "b", "autoencoder": "c"}):
        with pytest.raises(UserError, match="give --samples, or --generator and --autoencoder"):
            GenerationConfig(reference="r", **places)
    with pytest.raises(UserError, match="--generator needs --autoencoder"):
        GenerationConfig(reference="r", generator="g")
