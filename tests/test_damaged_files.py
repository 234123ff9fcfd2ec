"""Damaged files of runs and reports: each reader takes them or raises a `UserError` of one line."""

import functools
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from fuzz import Reader, check_reader, damaged_bytes, damaged_content, damaged_text, damaged_tree
from torch import nn

from sendvae_fast.config import load_config
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.engine import checkpoint_files, run_lock
from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.engine.snapshot import Snapshot
from sendvae_fast.engine.streams import HostMemory
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import Result, append_results
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS, load_demo_vit
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.report.load import load_report
from sendvae_fast.report.page import write_report
from sendvae_fast.train.vae.model_card import facts_of_checkpoint
from sendvae_fast.train.vae.settings import VAETrainConfig

pytestmark = pytest.mark.slow

OLD_RUNS = Path(__file__).parent / "old_runs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(OLD_RUNS / "vae/checkpoints/step_00000003", folder / "vae/checkpoints/step_00000003")
    shutil.copytree(OLD_RUNS / "sit/checkpoints/step_00000003", folder / "sit")
    shutil.copytree(OLD_RUNS / "latents", folder / "latents")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(OLD_RUNS / "vae" / name, folder / "vae" / name)
    shutil.copy(DEMO_WEIGHTS, folder / "vit.safetensors")
    write = engine().snapshot(Snapshot(HostMemory()))
    write(folder / "state")
    run = RunDirectory(folder / "run", OptimizerConfig(), Distributed())
    Checkpointer(run.checkpoints, Distributed(), config_hash=run.config_hash).save(7, write)
    shutil.copy(folder / "run/environment.json", folder / "vae/environment.json")
    variants = [{"name": name, "description": "", "evaluations": ["evaluation.jsonl"]} for name in ("one", "two")]
    results = {"title": "two", "candidate": "one", "control": "two", "notes": ["a note"], "variants": variants}
    (folder / "compared").mkdir()
    (folder / "compared/results.json").write_text(json.dumps(results))
    measured = [
        Result(metric="psnr", value=20.0, interval=(19.0, 21.0), protocol="adm", counts={"pictures": 100}),
        Result(metric="attribute_f1", value=0.5, protocol="probe", details={"f1": {"red": 0.5, "big": 0.6}}),
    ]
    append_results(folder / "compared/evaluation.jsonl", measured)
    (folder / "lock.json").write_text(json.dumps({"host": socket.gethostname(), "process": 1, "since": "yesterday"}))
    return folder


@functools.cache
def engine() -> Engine:
    return build_engine(nn.Linear(4, 3), OptimizerConfig(), EngineConfig(name="ddp"), Distributed())


def resume(folder):
    run = RunDirectory(folder / "run", OptimizerConfig(), Distributed())
    step, directory = Checkpointer(run.checkpoints, Distributed(), config_hash=run.config_hash).load_latest()
    engine().load(directory)
    assert step == 7


def read_latents(folder):
    cache = LatentCache.open(folder / "latents")
    mean, std, labels = cache.load(torch.arange(len(cache)))
    assert mean.shape == std.shape and len(labels) == len(cache)
    assert cache.latent_mean.isfinite().all() and (cache.latent_std > 0).all()


def damaged_lines(path, draw):
    """Of JSON lines: half of the copies have one line of unsound values."""
    lines = path.read_text().splitlines()
    if draw.random() < 0.5:
        return damaged_bytes(path.read_bytes(), draw)
    number = draw.randrange(len(lines))
    lines[number] = json.dumps(damaged_tree(json.loads(lines[number]), draw))
    return "\n".join(lines).encode()


def resealed(path, draw):
    manifest = damaged_tree(json.loads(path.read_text()), draw)
    if isinstance(manifest, dict):
        manifest.pop("seal", None)
        manifest["seal"] = checkpoint_files._seal(manifest)
    return json.dumps(manifest).encode()


def look_at_lock(folder):
    """As where the file system has no locks: the file says who has the run, and a damaged one locks nobody out."""
    path = folder / "lock.json"
    assert run_lock._is_alive(path) in (False, True) and str(run_lock._refusal(path)).isprintable()
    if not run_lock._owner(path):
        raise UserError("nobody's")


def read_autoencoder(folder):
    load_autoencoder(folder / "vae/checkpoints/step_00000003")


def read_generator(folder):
    load_sit(folder / "sit")


def read_facts(folder):
    facts_of_checkpoint(folder / "vae/checkpoints/step_00000003")


def read_run_for_report(folder):
    load_report(folder / "vae")


def report_comparison(folder):
    write_report(folder / "report.html", load_report(folder / "compared"))


def read_engine_state(folder):
    engine().load(folder / "state")


READERS = {
    "config": Reader(
        "vae/config.yaml", damaged_text, lambda folder: load_config(VAETrainConfig, [folder / "vae/config.yaml"], {})
    ),
    "config of a run": Reader("run/config.yaml", damaged_text, resume),
    "manifest": Reader("run/checkpoints/step_00000007/manifest.json", damaged_text, resume),
    "resealed manifest": Reader("run/checkpoints/step_00000007/manifest.json", resealed, resume),
    "lock of a run": Reader("lock.json", damaged_text, look_at_lock),
    "settings for a model card": Reader("vae/config.yaml", damaged_text, read_facts),
    "metrics": Reader("vae/metrics.jsonl", damaged_content, read_facts),
    "autoencoder's config": Reader("vae/checkpoints/step_00000003/config.json", damaged_text, read_autoencoder),
    "autoencoder": Reader("vae/checkpoints/step_00000003/model.safetensors", damaged_content, read_autoencoder),
    "statistics": Reader("vae/checkpoints/step_00000003/latent_stats.safetensors", damaged_content, read_autoencoder),
    "generator's config": Reader("sit/config.json", damaged_text, read_generator),
    "generator": Reader("sit/ema.safetensors", damaged_content, read_generator),
    "latents' description": Reader("latents/cache.json", damaged_text, read_latents),
    "latents": Reader("latents/latents_00000.safetensors", damaged_content, read_latents),
    "counts of the engine": Reader("state/state.json", damaged_text, read_engine_state),
    "state of the engine": Reader("state/optimizer_rank0.safetensors", damaged_content, read_engine_state),
    "report: metrics": Reader("vae/metrics.jsonl", damaged_lines, read_run_for_report),
    "report: settings": Reader("vae/config.yaml", damaged_text, read_run_for_report),
    "report: environment": Reader("vae/environment.json", damaged_text, read_run_for_report),
    "report: results": Reader("compared/results.json", damaged_text, report_comparison),
    "report: evaluations": Reader("compared/evaluation.jsonl", damaged_lines, report_comparison),
    "foundation model of the demo": Reader(
        "vit.safetensors",
        damaged_content,
        lambda folder: load_demo_vit(FoundationConfig(name="demo", weights=str(folder / "vit.safetensors"))),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_user_error_or_nothing(name, folder):
    check_reader(name, READERS[name], folder)
