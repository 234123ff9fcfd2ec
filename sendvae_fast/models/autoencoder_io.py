"""Autoencoders on disk.

Our format is a plain folder::

    config.json               the fields of AutoencoderConfig
    model.safetensors         weights in the LDM layout, nothing else
    latent_stats.safetensors  latent_mean, latent_std: float32 [C], per channel of the posterior's samples

Published weights in the LDM layout (SD-VAE, VA-VAE, REPA-E) are read by `load_ldm_weights`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder import Autoencoder, AutoencoderConfig
from sendvae_fast.models.weights import load_weights, read_weights

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STATS_FILE = "latent_stats.safetensors"

# VA-VAE's training checkpoints carry these beside the autoencoder.
_FOREIGN_PREFIXES = ("loss.", "foundation_model.", "linear_proj.")


class SavedAutoencoder(NamedTuple):
    """What `load_autoencoder` finds in a folder."""

    autoencoder: Autoencoder
    latent_mean: Tensor  # [C] float32
    latent_std: Tensor  # [C] float32


def save_autoencoder(
    directory: str | Path, autoencoder: Autoencoder, latent_mean: Tensor, latent_std: Tensor
) -> None:
    """Write the folder described above; each file appears whole or not at all, the configuration last.

    `latent_mean` and `latent_std` are [C], of the normalisation that generators apply before they add noise.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in autoencoder.state_dict().items()}
    channels = autoencoder.config.latent_channels
    stats = {"latent_mean": latent_mean, "latent_std": latent_std}
    stats = {key: value.detach().float().cpu().reshape(channels) for key, value in stats.items()}
    config = json.dumps(dataclasses.asdict(autoencoder.config), indent=2) + "\n"
    _write_whole(directory / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _write_whole(directory / STATS_FILE, lambda path: save_file(stats, path, metadata={"format": "pt"}))
    _write_whole(directory / CONFIG_FILE, lambda path: path.write_text(config))


def load_autoencoder(directory: str | Path) -> SavedAutoencoder:
    """Read a folder that `save_autoencoder` wrote, on the CPU in float32 and evaluation mode.

    Raises `UserError` where a file is missing or broken, or the weights are not those of the configuration.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(
            f"{directory} is not an autoencoder folder, it has no {CONFIG_FILE}: give the folder that stage 1 exported"
        )
    try:
        config = AutoencoderConfig(**json.loads((directory / CONFIG_FILE).read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{directory / CONFIG_FILE} is not an autoencoder configuration: {error}") from error
    autoencoder = Autoencoder(config)
    load_weights(autoencoder, read_weights(directory / WEIGHTS_FILE), directory / WEIGHTS_FILE)
    stats = read_weights(directory / STATS_FILE)
    for key in ("latent_mean", "latent_std"):
        if key not in stats or stats[key].shape != (config.latent_channels,):
            raise UserError(
                f"{directory / STATS_FILE} lacks {key} of shape [{config.latent_channels}]: export the folder again"
            )
    return SavedAutoencoder(autoencoder.eval(), stats["latent_mean"].float(), stats["latent_std"].float())


def load_ldm_weights(autoencoder: Autoencoder, path: str | Path) -> None:
    """Load a published file in the LDM layout, bare or wrapped in ``state_dict``, into `autoencoder`.

    The training leftovers of VA-VAE's checkpoints (loss, foundation model, projection) are passed over; anything else
    that does not match is a `UserError`.
    """
    content = read_weights(path)
    state = content.get("state_dict", content)
    load_weights(autoencoder, {k: v for k, v in state.items() if not k.startswith(_FOREIGN_PREFIXES)}, path)


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` and rename, so that a killed run leaves no half file under the real name."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)
