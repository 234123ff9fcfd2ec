"""Autoencoders on disk.

Our format is a plain folder:

    config.json               the fields of AutoencoderConfig, or of MAETokConfig
    model.safetensors         weights in the LDM layout, or MAETok's, nothing else
    latent_stats.safetensors  latent_mean, latent_std: float32 [C], per channel of the posterior's samples

Published weights (SD-VAE, VA-VAE, REPA-E, MAETok; see `published`) are read in their own form too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sendvae_fast.engine.run_weights import part_of
from sendvae_fast.errors import UserError
from sendvae_fast.files import AUTOENCODER_PART, CONFIG_FILE, save_tensors, write_atomic
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.autoencoder.maetok import MAETok, MAETokConfig
from sendvae_fast.models.autoencoder.published import FoundAutoencoder, is_published, read_published
from sendvae_fast.models.latent_statistics import STATS_FILE, choose_statistics, save_statistics, statistics_of_file
from sendvae_fast.models.weights import build_to_fit, read_weights
from sendvae_fast.reading import dataclass_of, read_json, reading

WEIGHTS_FILE = "model.safetensors"


class SavedAutoencoder(NamedTuple):
    """The contents of a folder that `load_autoencoder` read."""

    autoencoder: ImageAutoencoder
    latent_mean: Tensor  # [C] float32
    latent_std: Tensor  # [C] float32
    statistics_origin: str
    """Where mean and std come from."""


def save_autoencoder(
    directory: str | Path, autoencoder: ImageAutoencoder, latent_mean: Tensor, latent_std: Tensor
) -> None:
    """Write the folder described above; each file appears whole or not at all, the configuration last.

    `latent_mean` and `latent_std` are [C], of the normalisation that generators apply before they add noise.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in autoencoder.state_dict().items()}
    channels = autoencoder.config.latent_channels
    config = json.dumps(dataclasses.asdict(autoencoder.config), indent=2) + "\n"
    save_tensors(directory / WEIGHTS_FILE, state, {"format": "pt"})
    save_statistics(directory, latent_mean.reshape(channels), latent_std.reshape(channels))
    write_atomic(directory / CONFIG_FILE, config)


def load_autoencoder(
    path: str | Path, stats: str | Path | None = None, scaling_factor: float | None = None
) -> SavedAutoencoder:
    """Read a folder that `save_autoencoder` wrote, a checkpoint that has one, or anything that `read_published` reads.

    The network is on the CPU, in float32 and evaluation mode. The latent statistics are `stats` (a file) or
    `scaling_factor` (one number for all channels), else what is found: in our folder, in a diffusers config, in a
    REPA-E batch norm in the checkpoint, or in a file beside it.
    Raises `UserError` where a file is missing or broken, the weights are not those of the configuration or not finite,
    or there are no statistics.
    """
    path = part_of(Path(path), AUTOENCODER_PART)
    found = read_published(path) if is_published(path) else _read_own(path)
    channels = found.config.latent_channels
    statistics = choose_statistics(path, found.statistics, stats, scaling_factor, channels, layout="sendvae")
    autoencoder = build_to_fit(lambda: _build(found.config), found.state, found.weights)
    return SavedAutoencoder(autoencoder.eval(), *statistics)


def convolutional(autoencoder: ImageAutoencoder, source: str | Path) -> Autoencoder:
    """The autoencoder of `source` for who trains or exports it; `UserError` unless it is latent-diffusion's network."""
    if isinstance(autoencoder, Autoencoder):
        return autoencoder
    raise UserError(
        f"{source} is a {type(autoencoder).__name__}, which encodes and decodes here but is neither trained nor "
        "written in another layout: give an autoencoder of latent-diffusion's architecture"
    )


def _build(config: AutoencoderConfig | MAETokConfig) -> ImageAutoencoder:
    return MAETok(config) if isinstance(config, MAETokConfig) else Autoencoder(config)


def _read_own(directory: Path) -> FoundAutoencoder:
    config_file, weights, stats = (directory / name for name in (CONFIG_FILE, WEIGHTS_FILE, STATS_FILE))
    if not config_file.is_file():
        raise UserError(
            f"{directory} is not an autoencoder folder, it has no {CONFIG_FILE}: give the folder that stage 1 exported"
        )
    sizes = read_json(config_file, "export the autoencoder again")
    with reading(config_file, "it is not an autoencoder configuration; export the autoencoder again"):
        kind = MAETokConfig if "num_latent_tokens" in sizes else AutoencoderConfig
        config = dataclass_of(kind, sizes)
    return FoundAutoencoder(config, read_weights(weights), weights, statistics_of_file(stats))
