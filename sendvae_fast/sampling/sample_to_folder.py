"""A sampling job: pictures of ids 0 .. num_samples - 1 into a folder, over any number of ranks, resumable."""

from __future__ import annotations

import math
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml

from sendvae_fast.config import plain
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run import recorded_changes
from sendvae_fast.engine.run_weights import resolve_weights, step_of
from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic
from sendvae_fast.image_grid import save_grid
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.storage import SavedSiT, load_sit
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.progress import Progress
from sendvae_fast.sampling.generate import LatentDecoder, check_fit, generate
from sendvae_fast.sampling.settings import SampleConfig
from sendvae_fast.sampling.writer import PngFolder, write_npz

MAX_GRID = 64
"""Pictures in the overview grid."""
SETTINGS_FILE = "settings.yaml"
# Weights are compared by their contents, not by their paths.
MAY_CHANGE = (
    "generator", "generator_step", "autoencoder", "autoencoder_step", "out", "num_samples", "batch_size", "npz",
    "cuda_graphs",
)  # fmt: skip


def sample_to_folder(config: SampleConfig, distributed: Distributed) -> PngFolder:
    """Draw the pictures that are missing in `config.out`, then write the grid and, if wanted, the npz. Collective.

    Raises:
        UserError: a weight folder is missing or broken, the two do not belong together, the folder holds pictures drawn
            with other settings, or the disk is full.
    """
    saved = load_sit(resolve_weights(config.generator), ema=config.ema)
    autoencoder = load_autoencoder(resolve_weights(config.autoencoder)).autoencoder
    check_fit(saved.sit.config, autoencoder, config)
    folder = PngFolder(config.out)
    problem = _claim(folder, config, saved, autoencoder) if distributed.is_main else None
    if problem := distributed.broadcast_object(problem):
        raise UserError(problem)
    own_ids = torch.tensor(_own_ids(folder, config.num_samples, distributed), device=distributed.device).long()
    decoder = LatentDecoder(autoencoder.to(distributed.device), saved.latent_mean, saved.latent_std)
    total = len(own_ids) * config.sampler.num_steps
    with Progress("sampling", total, unit="picture step") as progress:
        for batch in generate(saved.sit.to(distributed.device), decoder, own_ids, config, progress.advance):
            folder.write(batch.ids.tolist(), batch.images)
    distributed.barrier()
    if distributed.is_main:
        _write_overview(folder, config)
    distributed.barrier()
    return folder


def _claim(folder: PngFolder, config: SampleConfig, saved: SavedSiT, autoencoder: ImageAutoencoder) -> str | None:
    """Make the folder ready for these settings; returns an error for the user, if any."""
    statistics = {"latent_mean": saved.latent_mean, "latent_std": saved.latent_std}
    settings: dict[str, Any] = {
        **plain(config), "generator_sha256": weights_sha256({**saved.sit.state_dict(), **statistics}),
        "autoencoder_sha256": weights_sha256(autoencoder.state_dict()),
        **{f"{role}_step": step_of(resolve_weights(settings_path)) for role, settings_path in
           (("generator", config.generator), ("autoencoder", config.autoencoder))},
    }  # fmt: skip
    recorded = folder.root / SETTINGS_FILE
    try:
        if folder.sample_ids():  # settings of a job that failed before its first picture do not count
            if not recorded.exists():
                return (
                    f"{folder.root} holds pictures but no {SETTINGS_FILE} to say how they were drawn: give a new folder"
                )
            changes = recorded_changes(recorded, settings, MAY_CHANGE, "repair it, or give another folder")
            if changes:
                return f"{folder.root} was begun with other settings ({changes}): repeat them, or give another folder"
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.remove_unfinished()
        write_atomic(recorded, yaml.safe_dump(settings, sort_keys=False))
    except OSError as error:
        return f"cannot write to {folder.root} ({error.strerror}): choose another place"
    except UserError as error:
        return str(error)
    num_classes = saved.sit.config.num_classes
    if config.labels == "equal" and config.num_samples % num_classes:
        print(
            f"note: {config.num_samples} is not a multiple of the {num_classes} classes, so the last ones get a "
            "picture less; more pictures can be added later",
            file=sys.stderr,
        )
    return None


def _own_ids(folder: PngFolder, num_samples: int, distributed: Distributed) -> list[int]:
    """The ids that this rank draws. Missing pictures are dealt out evenly, so that no rank waits long for another."""
    found = folder.missing(range(distributed.rank, num_samples, distributed.world_size))
    missing = sorted(chain.from_iterable(distributed.gather_objects(found)))
    return missing[distributed.rank :: distributed.world_size]


def _write_overview(folder: PngFolder, config: SampleConfig) -> None:
    shown = range(min(MAX_GRID, config.num_samples))
    grid = folder.root.with_name(f"{folder.root.name}.png")
    save_grid(grid, next(folder.batches(shown, len(shown))), columns=math.ceil(math.sqrt(len(shown))))
    if config.npz:
        batches = folder.batches(range(config.num_samples), batch_size=256)
        write_npz(npz_path(config.out), batches, config.num_samples)


def npz_path(out: str | Path) -> Path:
    """The sample file of the ADM evaluator that belongs to a folder of pictures."""
    return Path(out).with_name(f"{Path(out).name}.npz")
