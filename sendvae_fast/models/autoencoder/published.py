"""Autoencoders as others publish them: folders of diffusers and of MAETok, checkpoint files in the LDM layout.

Files may be bare state dicts or training checkpoints that wrap one beside optimizers, losses, discriminators or whole
generators. Nothing in them is ever run: see `weights.read_weights`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.files import CONFIG_FILE
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.diffusers_layout import from_diffusers, from_diffusers_config
from sendvae_fast.models.autoencoder.maetok import MAETokConfig
from sendvae_fast.models.autoencoder.maetok_layout import (
    MARK,
    WEIGHTS_FILE,
    from_maetok,
    maetok_state,
    maetok_statistics,
)
from sendvae_fast.models.latent_statistics import (
    LatentStatistics,
    statistics_beside,
    statistics_of_batch_norm,
    statistics_of_diffusers,
)
from sendvae_fast.models.weights import part_of_checkpoint, read_weights
from sendvae_fast.reading import names_key, read_json, reading

_DIFFUSERS_MARK = "block_out_channels"
_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

_WRAPPERS = ("vae", "state_dict", "model", "ema")
"""Entries of a checkpoint that may hold the weights. REPA-E has generators in its model and ema beside the vae."""

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""The parts of an autoencoder. VA-VAE's checkpoints have loss.*, foundation_model.* and linear_proj beside it."""

_FIRST_WEIGHT = "encoder.conv_in.weight"


class FoundAutoencoder(NamedTuple):
    """The contents of a folder or file, not yet checked whether its parts belong together."""

    config: AutoencoderConfig | MAETokConfig
    state: dict[str, Tensor]  # in the LDM layout, or `MAETok`'s
    weights: Path
    """The file that `state` is from."""
    statistics: LatentStatistics | None
    """Unchecked; None where the source has none."""


def is_published(path: Path) -> bool:
    """Whether `path` is a file, or a folder of diffusers or MAETok: whether `read_published` is for it."""
    if not path.is_dir():
        return path.exists()
    config = path / CONFIG_FILE
    return names_key(config, _DIFFUSERS_MARK) or names_key(config, MARK)


def read_published(path: str | Path) -> FoundAutoencoder:
    """Read a folder of diffusers or MAETok, or a checkpoint file of MAETok or in the LDM layout.

    `UserError` where it is none of these.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    return _read_maetok(path) if names_key(path / CONFIG_FILE, MARK) else _read_diffusers(path)


def ldm_state(content: dict, path: str | Path) -> dict[str, Tensor]:
    """The autoencoder's part of a checkpoint in the LDM layout, without wrapper and prefix.

    `UserError` where there is none.
    """
    found = part_of_checkpoint(content, _FIRST_WEIGHT, _WRAPPERS)
    if found:
        return {key: value for key, value in found.items() if key.startswith(_PARTS)}
    raise UserError(f"{path} holds no autoencoder, it has no {_FIRST_WEIGHT}: give an autoencoder's checkpoint")


def ldm_config(state: dict[str, Tensor], path: str | Path) -> AutoencoderConfig:
    """Sizes as the shapes of an LDM state dict tell them; latent-diffusion's norms always have 32 groups."""

    def size(key: str, dim: int = 0) -> int:
        if getattr(state.get(key), "ndim", 0) != 4:
            raise UserError(f"{path} is not an autoencoder in the LDM layout, it lacks a convolution {key}")
        return state[key].shape[dim]

    if any(".down_blocks." in key for key in state):
        raise UserError(f"{path} is in the diffusers layout: give the folder that has it and its config.json")
    base = size(_FIRST_WEIGHT)
    levels = 0
    while f"encoder.down.{levels}.block.0.conv1.weight" in state:
        levels += 1
    widths = [size(f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)]
    if not widths or base < 1 or any(width % base for width in widths):
        raise UserError(f"{path} is not an LDM autoencoder: its levels of {widths} channels are no multiples of {base}")
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv1.weight" in state:
        blocks += 1
    attention = [level for level in range(levels) if f"encoder.down.{level}.attn.0.norm.weight" in state]
    return AutoencoderConfig(
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=blocks,
        attention_resolutions=tuple(AutoencoderConfig.nominal_resolution >> level for level in attention),
        latent_channels=size("decoder.conv_in.weight", dim=1),
        mid_attention="encoder.mid.attn_1.norm.weight" in state,
    )


def _read_file(path: Path) -> FoundAutoencoder:
    content = read_weights(path)
    with reading(path, "fetch it again"):
        if found := maetok_state(content):
            return FoundAutoencoder(*from_maetok(found, str(path)), path, statistics_beside(path))
        state = ldm_state(content, path)
        config = ldm_config(state, path)
    statistics = statistics_of_batch_norm(content, path.name) or statistics_beside(path)
    return FoundAutoencoder(config, state, path, statistics)


def _read_maetok(directory: Path) -> FoundAutoencoder:
    config_file, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    entries, content = read_json(config_file, "fetch the whole folder again"), read_weights(weights)
    with reading(weights, "fetch the whole folder again"):
        config, state = from_maetok(maetok_state(content), str(weights))
    with reading(config_file, "fetch the whole folder again"):
        statistics = maetok_statistics(entries, config.latent_channels, str(config_file))
    return FoundAutoencoder(config, state, weights, statistics)


def _read_diffusers(directory: Path) -> FoundAutoencoder:
    config_file = directory / CONFIG_FILE
    weights = next((directory / name for name in _DIFFUSERS_WEIGHTS if (directory / name).is_file()), None)
    if weights is None:
        raise UserError(f"{directory} has none of {', '.join(_DIFFUSERS_WEIGHTS)}: fetch the whole folder again")
    remedy = "give the folder of an AutoencoderKL, or fetch it again"
    entries = read_json(config_file, remedy)
    with reading(config_file, remedy):
        config = from_diffusers_config(entries)
        statistics = statistics_of_diffusers(entries, str(config_file))
    content = read_weights(weights)
    with reading(weights, remedy):
        state = from_diffusers(content, config)
    return FoundAutoencoder(config, state, weights, statistics)
