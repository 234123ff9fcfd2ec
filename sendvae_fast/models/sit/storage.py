"""SiT generators on disk.

Our format is a plain folder:

    config.json               the fields of SiTConfig
    model.safetensors         weights in the SiT / REPA layout
    ema.safetensors           their moving average, same keys: what samples are drawn from
    latent_stats.safetensors  latent_mean, latent_std: float32 [C], the normalisation of the latents it was trained on

Published checkpoints (SiT, REPA, REPA-E, LightningDiT, DiT, MAETok's SiT) are read in their own form too, see
`published_layouts`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sendvae_fast.engine.run_weights import part_of
from sendvae_fast.errors import UserError
from sendvae_fast.files import CONFIG_FILE, GENERATOR_PART, save_tensors, write_atomic
from sendvae_fast.models.autoencoder.storage import WEIGHTS_FILE
from sendvae_fast.models.latent_statistics import (
    STATS_FILE,
    LatentStatistics,
    choose_statistics,
    save_lightningdit_statistics,
    save_repa_e_statistics,
    save_statistics,
    statistics_beside,
    statistics_of_batch_norm,
    statistics_of_file,
)
from sendvae_fast.models.sit.published_layouts import FIRST_WEIGHTS, from_published, to_lightningdit, to_repa
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.models.weights import build_to_fit, load_weights, part_of_checkpoint, read_weights
from sendvae_fast.reading import dataclass_of, names_key, read_json, reading

EMA_FILE = "ema.safetensors"
PUBLISHED_FILE = "generator.pt"
_MAETOKS_MARK = "vae_1d"
"""An entry of the config.json of MAETok's SiT. Its weights tell the sizes as well."""
_SAME_SIZES = (
    "latent_channels", "latent_size", "patch_size", "width", "depth", "num_heads", "num_classes", "swiglu", "rms_norm",
    "rope", "qk_norm", "diffusion", "one_dimensional",
)  # fmt: skip


class SavedSiT(NamedTuple):
    """The contents of a folder or file that `load_sit` read."""

    sit: SiT
    latent_mean: Tensor  # [C] float32
    latent_std: Tensor  # [C] float32
    statistics_origin: str
    """Where mean and std come from."""


class _Found(NamedTuple):
    config: SiTConfig
    state: dict[str, Tensor]
    weights: Path
    statistics: LatentStatistics | None


def save_sit(
    directory: Path,
    config: SiTConfig,
    weights: dict[str, Tensor],
    ema: dict[str, Tensor],
    latent_mean: Tensor,
    latent_std: Tensor,
) -> None:
    """Write the folder described above from full CPU state dicts; each file whole or not at all, the sizes last."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / WEIGHTS_FILE, weights, {"format": "pt"})
    save_tensors(directory / EMA_FILE, ema, {"format": "pt"})
    save_statistics(directory, latent_mean, latent_std)
    write_atomic(directory / CONFIG_FILE, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_sit(
    path: str | Path,
    ema: bool = True,
    stats: str | Path | None = None,
    scaling_factor: float | None = None,
    is_dit: bool = False,
) -> SavedSiT:
    """Read a folder that `save_sit` wrote, a checkpoint that has one, or a published file, or MAETok's folder of one.

    The network is on the CPU, in float32 and evaluation mode.

    EMA weights unless `ema` is off; a file with one set of weights gives that. The latents' statistics are `stats` (a
    file), `scaling_factor` (one number for all channels), or what is found: in our folder, in REPA-E's batch norm
    (its variance as it is, without the eps it trains with, as REPA-E decodes), or in a file beside the checkpoint.
    `is_dit` says that a file with a learned sigma is DiT's, not SiT's: nothing in it does.

    Raises `UserError` where a file is missing or broken, the weights are not those of the configuration or not finite,
    or there are no statistics.
    """
    path = Path(path)
    sit, found = _read(path, ema, is_dit)
    channels = sit.config.latent_channels
    return SavedSiT(sit, *choose_statistics(path, found, stats, scaling_factor, channels, layout="generator"))


def load_initial_weights(sit: SiT, path: str | Path) -> None:
    """Give `sit` the (EMA) weights of a generator that `load_sit` reads; `UserError` where its sizes are others.

    Its latents' statistics are not needed. A REPA projector stays unchanged where the generator has none of its sizes.
    """
    saved, _ = _read(Path(path), ema=True)
    for name in _SAME_SIZES:
        theirs, ours = getattr(saved.config, name), getattr(sit.config, name)
        if theirs != ours:
            raise UserError(
                f"init_from={path} has a generator of {name}={theirs}, but this run's has {name}={ours}: change the "
                "generator's settings or the latents to fit, or start from other weights"
            )
    own, state = sit.state_dict(), saved.state_dict()
    projector = {key: value for key, value in own.items() if key.startswith("projectors.")}
    if any(getattr(state.get(key), "shape", None) != value.shape for key, value in projector.items()):
        state.update(projector)
    load_weights(sit, {key: value for key, value in state.items() if key in own}, path)


def write_published(
    directory: Path, raw: SavedSiT, ema: SavedSiT, layout: str, entries: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint in the layout "repa", "repa-e" or "lightningdit" into `directory`.

    It has the model and the EMA, and beside it the latent statistics in a file of that project's form.

    entries: what the checkpoint has beside or in place of these.
    """
    mean, std = ema.latent_mean, ema.latent_std
    if layout not in ("repa", "repa-e", "lightningdit"):
        raise ValueError(f"there is no layout {layout!r} of generators' checkpoints")
    if layout == "lightningdit":
        content = {"model": to_lightningdit(raw.sit), "ema": to_lightningdit(ema.sit)}
        save_lightningdit_statistics(directory, mean, std)
    else:
        has_batch_norm = layout == "repa-e"
        content = {name: to_repa(part.sit, mean, std, has_batch_norm) for name, part in (("model", raw), ("ema", ema))}
        save_repa_e_statistics(directory / PUBLISHED_FILE, mean, std)
    torch.save({**content, **(entries or {})}, directory / PUBLISHED_FILE)


def _read(path: Path, ema: bool, is_dit: bool = False) -> tuple[SiT, LatentStatistics | None]:
    path = part_of(path, GENERATOR_PART)
    if names_key(path / CONFIG_FILE, _MAETOKS_MARK):
        path = path / WEIGHTS_FILE
    found = _read_published(path, ema, is_dit) if path.is_file() else _read_own(path, ema)
    sit = build_to_fit(lambda: SiT(found.config), found.state, found.weights)
    return sit.eval(), found.statistics


def _read_published(path: Path, ema: bool, is_dit: bool) -> _Found:
    wrappers = ("ema", "model", "state_dict") if ema else ("model", "state_dict", "ema")
    content = read_weights(path)
    found = (part_of_checkpoint(content, first, wrappers) for first in FIRST_WEIGHTS)
    state = next((part for part in found if part), None)
    if state is None:
        raise UserError(f"{path} holds no SiT, it has no {FIRST_WEIGHTS[0]}: give a generator's checkpoint")
    with reading(path, "fetch it again"):
        config, own = from_published(state, str(path), is_dit)
    statistics = statistics_of_batch_norm(state, path.name) or statistics_beside(path)
    return _Found(config, own, path, statistics)


def _read_own(directory: Path, ema: bool) -> _Found:
    config_file = directory / CONFIG_FILE
    if not config_file.is_file():
        raise UserError(f"{directory} is not a SiT folder (no {CONFIG_FILE}); give a `train sit` run or checkpoint")
    sizes = read_json(config_file, "use another checkpoint")
    with reading(config_file, "it is not a SiT configuration; use another checkpoint"):
        config = dataclass_of(SiTConfig, sizes)
    weights = directory / (EMA_FILE if ema else WEIGHTS_FILE)
    return _Found(config, read_weights(weights), weights, statistics_of_file(directory / STATS_FILE))
