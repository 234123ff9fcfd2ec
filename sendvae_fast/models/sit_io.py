"""SiT generators on disk, a plain folder::

    config.json               the fields of SiTConfig
    model.safetensors         weights in the SiT / REPA layout
    ema.safetensors           their moving average, same keys: what samples are drawn from
    latent_stats.safetensors  latent_mean, latent_std: float32 [C], the normalisation of the latents it was trained on
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder_io import CONFIG_FILE, STATS_FILE, WEIGHTS_FILE
from sendvae_fast.models.sit import SiT
from sendvae_fast.models.sit_config import SiTConfig
from sendvae_fast.models.weights import load_weights, read_weights

EMA_FILE = "ema.safetensors"


class SavedSiT(NamedTuple):
    """What `load_sit` finds in a folder."""

    sit: SiT
    latent_mean: Tensor  # [C] float32
    latent_std: Tensor  # [C] float32


def save_sit(
    directory: Path, config: SiTConfig, weights: dict[str, Tensor], ema: dict[str, Tensor], latent_mean: Tensor,
    latent_std: Tensor,
) -> None:
    """Write the folder described above from full CPU state dicts."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    save_file(ema, directory / EMA_FILE, metadata={"format": "pt"})
    stats = {"latent_mean": latent_mean.float().cpu(), "latent_std": latent_std.float().cpu()}
    save_file(stats, directory / STATS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_sit(directory: str | Path, ema: bool = True) -> SavedSiT:
    """Read a folder that `save_sit` wrote, on the CPU in float32 and evaluation mode; EMA weights unless `ema` is off.

    Raises `UserError` where a file is missing or broken, or the weights are not those of the configuration.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory} is not a SiT folder (no {CONFIG_FILE}); give a `train sit` run or checkpoint")
    try:
        config = SiTConfig(**json.loads((directory / CONFIG_FILE).read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{directory / CONFIG_FILE} is not a SiT configuration: {error}") from error
    weights = directory / (EMA_FILE if ema else WEIGHTS_FILE)
    sit = SiT(config)
    load_weights(sit, read_weights(weights), weights)
    stats = read_weights(directory / STATS_FILE)
    return SavedSiT(sit.eval(), stats["latent_mean"], stats["latent_std"])
