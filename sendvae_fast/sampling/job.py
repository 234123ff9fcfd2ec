"""A sampling job: pictures of ids 0 .. num_samples - 1 into a folder, over any number of ranks, resumable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder_io import load_autoencoder
from sendvae_fast.models.sit_io import load_sit
from sendvae_fast.progress import Progress
from sendvae_fast.sampling.generate import GenerateConfig, LatentDecoder, generate
from sendvae_fast.sampling.writer import PngFolder, save_grid, write_npz

MAX_GRID = 64
"""Pictures in the overview grid."""


@dataclass(kw_only=True)
class SampleConfig(GenerateConfig):
    """A sampling job."""

    generator: str
    """SiT folder, checkpoint or stage 2 run."""
    autoencoder: str
    """Autoencoder folder, checkpoint or stage 1 run: the one that made the generator's latents."""
    out: str
    """Folder of the PNG files, named by sample id; `<out>.png` is an overview grid."""
    ema: bool = True
    """Sample from the moving average of the weights, as all published numbers do."""
    npz: bool = False
    """Also write `<out>.npz`, the sample file of the ADM evaluator."""


def sample_to_folder(config: SampleConfig) -> PngFolder:
    """Draw the pictures that are missing in `config.out`, then write the grid and, if wanted, the npz. Collective.

    Raises:
        UserError: a weight folder is missing or broken, or the two do not belong together.
    """
    distributed = init_distributed()
    saved = load_sit(resolve_weights(config.generator), ema=config.ema)
    autoencoder = load_autoencoder(resolve_weights(config.autoencoder)).autoencoder
    if autoencoder.config.latent_channels != saved.sit.config.latent_channels:
        raise UserError(
            f"the generator makes latents of {saved.sit.config.latent_channels} channels but the autoencoder decodes "
            f"{autoencoder.config.latent_channels}; give the autoencoder whose latents the generator was trained on"
        )
    folder = PngFolder(config.out)
    own_ids = range(distributed.rank, config.num_samples, distributed.world_size)
    missing = torch.tensor(folder.missing(own_ids), dtype=torch.int64, device=distributed.device)
    decoder = LatentDecoder(autoencoder.to(distributed.device), saved.latent_mean, saved.latent_std)
    total = len(missing) * config.sampler.num_steps
    with Progress("sampling", total, unit="picture step") as progress:
        for batch in generate(saved.sit.to(distributed.device), decoder, missing, config, progress.advance):
            folder.write(batch.ids.tolist(), batch.images)
    distributed.barrier()
    if distributed.is_main:
        _write_overview(folder, config)
    distributed.barrier()
    return folder


def _write_overview(folder: PngFolder, config: SampleConfig) -> None:
    shown = range(min(MAX_GRID, config.num_samples))
    grid = Path(config.out).with_suffix(".png")
    save_grid(grid, next(folder.batches(shown, len(shown))), columns=math.ceil(math.sqrt(len(shown))))
    if config.npz:
        batches = folder.batches(range(config.num_samples), batch_size=256)
        write_npz(Path(config.out).with_suffix(".npz"), batches, config.num_samples)
