"""Every file that is read again: whatever happened to it, the reader takes it or raises a `UserError` of one line."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from fuzz import damaged_bytes, damaged_text, damaged_tree
from torch import nn

from sendvae_fast.config import load_config
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.engine import checkpoint
from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.optimizer import OptimizerConfig
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import EngineConfig
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS, load_demo_vit
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.train.vae.model_card import facts_of_checkpoint
from sendvae_fast.train.vae.settings import VAETrainConfig

pytestmark = pytest.mark.slow

OLD_RUNS = Path(__file__).parent / "old_runs"
TIMES = int(os.environ.get("SENDVAE_FUZZ", "100"))
"""Damaged copies of each file; the counts of docs/reliability.md are of 1,000."""
VAE = "vae/checkpoints/step_00000003"
SIT = "sit/checkpoints/step_00000003"


@pytest.fixture
def runs(tmp_path):
    shutil.copytree(OLD_RUNS, tmp_path / "runs")
    return tmp_path / "runs"


def use_latents(runs):
    cache = LatentCache.open(runs / "latents")
    mean, std, labels = cache.load(torch.arange(len(cache)))
    assert mean.shape == std.shape and len(labels) == len(cache)
    assert cache.latent_mean.isfinite().all() and (cache.latent_std > 0).all()


def use_engine_state(runs):
    module = nn.Linear(4, 3)
    engine = build_engine(module, OptimizerConfig(), EngineConfig(), Distributed())
    engine.load(runs / "state")


def write_engine_state(runs):
    engine = build_engine(nn.Linear(4, 3), OptimizerConfig(), EngineConfig(), Distributed())
    engine.save(runs / "state")


def reseal(path, draw):
    manifest = damaged_tree(json.loads(path.read_text()), draw)
    if isinstance(manifest, dict):
        manifest.pop("seal", None)
        manifest["seal"] = checkpoint._seal(manifest)
    return json.dumps(manifest).encode()


def binary(path, draw):
    return damaged_bytes(path.read_bytes(), draw)


READERS = {
    "config": ("vae/config.yaml", damaged_text, lambda runs: load_config(VAETrainConfig, [runs / "vae/config.yaml"], {})),
    "config of a run": (
        "vae/config.yaml",
        damaged_text,
        lambda runs: RunDirectory(runs / "vae", OptimizerConfig(), Distributed()),
    ),
    "manifest": (f"{VAE}/manifest.json", damaged_text, lambda runs: Checkpointer(runs / "vae/checkpoints", Distributed()).load_latest()),
    "resealed manifest": (f"{VAE}/manifest.json", reseal, lambda runs: Checkpointer(runs / "vae/checkpoints", Distributed()).load_latest()),
    "model card": ("vae/config.yaml", damaged_text, lambda runs: facts_of_checkpoint(runs / VAE)),
    "metrics": ("vae/metrics.jsonl", binary, lambda runs: facts_of_checkpoint(runs / VAE)),
    "autoencoder's config": (f"{VAE}/config.json", damaged_text, lambda runs: load_autoencoder(runs / VAE)),
    "autoencoder's weights": (f"{VAE}/model.safetensors", binary, lambda runs: load_autoencoder(runs / VAE)),
    "latent statistics": (f"{VAE}/latent_stats.safetensors", binary, lambda runs: load_autoencoder(runs / VAE)),
    "generator's config": (f"{SIT}/config.json", damaged_text, lambda runs: load_sit(runs / SIT)),
    "generator's weights": (f"{SIT}/ema.safetensors", binary, lambda runs: load_sit(runs / SIT)),
    "latents' description": ("latents/cache.json", damaged_text, use_latents),
    "latents": ("latents/latents_00000.safetensors", binary, use_latents),
    "engine's counts": ("state/state.json", damaged_text, use_engine_state),
    "engine's tensors": ("state/optimizer_rank0.safetensors", binary, use_engine_state),
    "demo foundation model": (
        "vit.safetensors",
        binary,
        lambda runs: load_demo_vit(FoundationConfig(name="demo", weights=str(runs / "vit.safetensors"))),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_user_error_or_nothing(name, runs, capsys):
    file, damage, read = READERS[name]
    shutil.copy(DEMO_WEIGHTS, runs / "vit.safetensors")
    write_engine_state(runs)
    if name == "config of a run":
        RunDirectory(runs / "vae", OptimizerConfig(), Distributed())
    draw, sound = random.Random(name), (runs / file).read_bytes()
    refused = 0
    for count in range(TIMES):
        (runs / file).write_bytes(sound)
        content = damage(runs / file, draw)
        (runs / file).write_bytes(content)
        try:
            read(runs)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).isprintable(), error
        except Exception as error:
            (runs / file).with_suffix(".offender").write_bytes(content)
            raise AssertionError(f"copy {count}: {type(error).__name__}: {content[:300]!r}") from error
    (runs / file).write_bytes(sound)
    read(runs)
    assert refused > 0
