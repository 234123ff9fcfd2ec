"""Damaged files of demos, samples and evaluations: each reader takes them or raises a `UserError` of one line."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import Reader, check_reader, damaged_content, damaged_text

from sendvae_fast.compare.compare import claim_folder
from sendvae_fast.compare.results import Results
from sendvae_fast.compare.timeline import Speed, Timeline, costs
from sendvae_fast.demo.demo import comparison_of
from sendvae_fast.demo.settings import DemoConfig
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.correlation import PAPER_TABLE, read_table
from sendvae_fast.evaluation.drawn import sampling_settings
from sendvae_fast.evaluation.frechet import load_moments
from sendvae_fast.evaluation.latent_space.view import LatentView, read_view, write_view
from sendvae_fast.evaluation.origins import crop_size
from sendvae_fast.evaluation.pictures import open_pictures
from sendvae_fast.evaluation.probing.attribute_tables import read_celeba_attributes
from sendvae_fast.evaluation.result import Result, append_results, read_results
from sendvae_fast.ops.attention import table
from sendvae_fast.sampling.sample_to_folder import sample_to_folder
from sendvae_fast.sampling.settings import SampleConfig, SamplerConfig

pytestmark = pytest.mark.slow

OLD_RUNS = Path(__file__).parent / "old_runs"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for stage in ("vae", "sit"):
        shutil.copytree(OLD_RUNS / stage, folder / "runs" / stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        shape = table.AttentionShape(2, 2, 16, 8, torch.float32)
        table.save(CPU, [table.Measurement(shape, {"math": 1.0}, {"flash": "not built"}, ("math",))])
        table.table_path(CPU).rename(folder / "attention.json")
    sample(folder)
    claim_demo(folder)
    (folder / "demo/parts.json").write_text(json.dumps({"pictures": 1.5}))
    (folder / "demo/control").mkdir()
    (folder / "demo/control/parts.json").write_text(json.dumps({"fine-tuning": 2.0, "latents": 3.0}))
    shutil.copytree(OLD_RUNS / "sit", folder / "demo/control/sit")
    append_results(folder / "evaluation.jsonl", [Result(metric="psnr", value=20.0, protocol="adm")])
    write_view(folder / "view", LatentView(classes={"a": np.ones((2, 2))}, numbers={"class_silhouette": 0.5}))
    np.savez(folder / "pictures.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(folder / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    (folder / "celeba.txt").write_text("2\nRound Red\na.jpg 1 -1\nb.jpg -1  1\n")
    shutil.copy(PAPER_TABLE, folder / "correlation.csv")
    return folder


def sample(folder):
    config = SampleConfig(
        generator=str(folder / "runs/sit"), autoencoder=str(folder / "runs/vae"), out=str(folder / "drawn"),
        num_samples=2, sampler=SamplerConfig(num_steps=2),
    )  # fmt: skip
    sample_to_folder(config, Distributed())


def read_attention_table(folder):
    """A broken table is passed over, with a warning that must be one line too."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(table, "table_path", lambda device: folder / "attention.json")
        warnings.simplefilter("error")
        table.choices.cache_clear()
        try:
            table.choices("cpu", None)
        except UserWarning as warning:
            raise UserError(str(warning)) from None


@cache
def demo_in(folder):
    return comparison_of(DemoConfig(run=str(folder / "demo"), num_train_images=2, num_test_images=2))


def claim_demo(folder):
    claim_folder(demo_in(folder), ())


def read_demo(folder):
    """How far a demo is, from what its parts have left."""
    demo = demo_in(folder)
    results = Results(demo, Timeline(costs(demo, Speed(1.0, 1.0), 2, 2), num_workers=1))
    assert all(0 <= fraction <= 1 for fraction in results.done().values())


def append_and_read(folder):
    """A damaged line of before does not stop what has been measured from being added."""
    append_results(folder / "evaluation.jsonl", [Result(metric="ssim", value=0.5, protocol="adm")])
    assert '"ssim"' in (folder / "evaluation.jsonl").read_text().splitlines()[-1]
    read_results(folder / "evaluation.jsonl")


def read_pictures(folder):
    for batch in open_pictures(folder / "pictures.npz", 8).batches(2):
        assert batch.shape[1:] == (3, 8, 8)


READERS = {
    "settings of samples": Reader("drawn/settings.yaml", damaged_text, sample),
    "settings of measured samples": Reader(
        "drawn/settings.yaml", damaged_text, lambda folder: sampling_settings(folder / "drawn")
    ),
    "crop of a run": Reader(
        "runs/vae/config.yaml",
        damaged_text,
        lambda folder: crop_size(None, folder / "runs/vae/checkpoints/step_00000003"),
    ),
    "demo's settings": Reader("demo/settings.yaml", damaged_text, claim_demo),
    "demo's own parts": Reader("demo/parts.json", damaged_text, read_demo),
    "demo's parts": Reader("demo/control/parts.json", damaged_text, read_demo),
    "demo's metrics": Reader("demo/control/sit/metrics.jsonl", damaged_content, read_demo),
    "attention table": Reader("attention.json", damaged_text, read_attention_table),
    "results": Reader("evaluation.jsonl", damaged_content, append_and_read),
    "view of latents": Reader("view/view.json", damaged_text, lambda folder: read_view(folder / "view")),
    "npz of pictures": Reader("pictures.npz", damaged_content, read_pictures),
    "npz of moments": Reader("moments.npz", damaged_content, lambda folder: load_moments(folder / "moments.npz")),
    "attributes of CelebA": Reader(
        "celeba.txt", damaged_content, lambda folder: read_celeba_attributes(folder / "celeba.txt")
    ),
    "table of autoencoders": Reader(
        "correlation.csv", damaged_content, lambda folder: read_table(folder / "correlation.csv")
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_user_error_or_nothing(name, folder):
    check_reader(name, READERS[name], folder)
