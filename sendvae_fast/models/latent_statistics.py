"""Per-channel mean and standard deviation of latents, in the forms that published autoencoders come with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors
from sendvae_fast.models.weights import read_weights

STATS_FILE = "latent_stats.safetensors"
"""Beside our weights: latent_mean, latent_std, float32 [C]."""

_LIGHTNINGDIT_FILE = "latents_stats.pt"

_SD_VAE_FACTOR, _SD_VAE_CHANNELS = 0.18215, 4


class LatentStatistics(NamedTuple):
    """The normalisation of latents for generators: (z - mean) / std."""

    mean: Tensor  # [C] float32
    std: Tensor  # [C] float32
    origin: str
    """Where the numbers come from, for the reader of a conversion's output."""

    def checked(self, channels: int) -> LatentStatistics:
        """These statistics, flattened; `UserError` unless they are `channels` finite means and positive deviations."""
        mean, std = (torch.as_tensor(part, dtype=torch.float32).flatten() for part in self[:2])
        if mean.numel() != channels or std.numel() != channels:
            raise UserError(
                f"latent statistics of {self.origin} are {mean.numel()} means and {std.numel()} deviations, but the "
                f"latents have {channels} channels: give the file of their own statistics"
            )
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise UserError(
                f"latent statistics of {self.origin} hold NaN, inf or a deviation that is not above 0: "
                "give a file of sound ones"
            )
        return LatentStatistics(mean, std, self.origin)


def choose_statistics(
    path: Path,
    found: LatentStatistics | None,
    stats: str | Path | None,
    scaling_factor: float | None,
    channels: int,
    layout: str,
) -> LatentStatistics:
    """The statistics of a given file or number for all channels, else those `found` with the weights at `path`.

    `UserError` where there are none (and how `sendvae convert` to `layout` helps), both are asked for, or they are not
    for `channels` latent channels.
    """
    if stats is not None and scaling_factor is not None:
        raise UserError("stats and scaling_factor both say how latents are normalised: give one")
    if stats is not None:
        found = statistics_of_file(stats)
    elif scaling_factor is not None:
        found = statistics_of_factor(scaling_factor, channels)
    if found is None:
        raise UserError(
            f"{path} has no latent statistics: write a folder that has them with `sendvae convert {path} --to={layout} "
            "--out=DIR` and --stats=FILE, or --scaling_factor=0.18215 for SD-VAE"
        )
    return found.checked(channels)


def statistics_of_file(path: str | Path) -> LatentStatistics:
    """Statistics of a file: ours, REPA-E's (scale and bias, or a batch norm) or LightningDiT's (mean and std)."""
    content = read_weights(path)
    tensors = {name for name, value in content.items() if isinstance(value, Tensor)}
    if {"latent_mean", "latent_std"} <= tensors:
        return LatentStatistics(content["latent_mean"], content["latent_std"], str(path))
    if {"mean", "std"} <= tensors:
        return LatentStatistics(content["mean"], content["std"], str(path))
    if {"latents_bias", "latents_scale"} <= tensors:
        return LatentStatistics(content["latents_bias"], 1 / content["latents_scale"].float(), str(path))
    found = statistics_of_batch_norm(content, str(path))
    if found is not None:
        return found
    raise UserError(
        f"{path} holds no latent statistics: it must name latent_mean and latent_std, mean and std, latents_bias and "
        "latents_scale, or the buffers of a batch norm bn"
    )


def save_statistics(directory: Path, mean: Tensor, std: Tensor) -> None:
    """Write our file of mean and std [C] into a folder of weights."""
    stats = {"latent_mean": mean, "latent_std": std}
    stats = {key: value.detach().float().cpu().contiguous() for key, value in stats.items()}
    save_tensors(directory / STATS_FILE, stats, {"format": "pt"})


def save_lightningdit_statistics(directory: Path, mean: Tensor, std: Tensor) -> None:
    """Write the file that LightningDiT looks for in the folder of weights."""
    stats = {"mean": mean, "std": std}
    torch.save({key: value.view(1, -1, 1, 1) for key, value in stats.items()}, directory / _LIGHTNINGDIT_FILE)


def save_repa_e_statistics(weights: Path, mean: Tensor, std: Tensor) -> None:
    """Write the file that REPA-E looks for beside the file of weights."""
    stats = {"latents_scale": 1 / std, "latents_bias": mean}
    torch.save({key: value.view(1, -1, 1, 1) for key, value in stats.items()}, _repa_e_file(weights))


def _repa_e_file(weights: Path) -> Path:
    return weights.with_name(f"{weights.stem}-latents-stats.pt")


def statistics_beside(path: Path) -> LatentStatistics | None:
    """Statistics from the file that REPA-E, LightningDiT or `sendvae` puts beside the weights at `path`, if any."""
    for name in (_repa_e_file(path).name, _LIGHTNINGDIT_FILE, STATS_FILE):
        if path.with_name(name).is_file():
            return statistics_of_file(path.with_name(name))
    return None


def statistics_of_batch_norm(content: dict, origin: str) -> LatentStatistics | None:
    """Statistics from the batch norm in a REPA-E checkpoint, if any: EMA before raw buffers, as REPA-E exports.

    They are what REPA-E writes into its `-latents-stats.pt` and decodes by: the running variance as it stands. Its
    batch norm adds 1e-4 to it where it normalises latents, which changes a latent of unit variance by 5e-5 of itself.
    """
    for state in (content.get("ema"), content.get("model"), content):
        if not isinstance(state, dict):
            continue
        for key in state:
            head, _, last = str(key).rpartition(".")
            if last != "running_mean" or head.split(".")[-1] != "bn":
                continue
            mean, variance = state[key], state.get(f"{head}.running_var")
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                return LatentStatistics(mean, variance.float().sqrt(), f"batch norm {head} in {origin}")
    return None


def statistics_of_factor(factor: float, channels: int, shift: float = 0.0, origin: str = "") -> LatentStatistics:
    """Statistics that are the same for every channel: (z - shift) * factor."""
    if not factor > 0:
        raise UserError(f"scaling_factor is {factor}: it must be above 0, like the 0.18215 of SD-VAE")
    return statistics_of_numbers(shift, 1 / factor, channels, origin or f"scaling_factor={factor}")


def statistics_of_numbers(mean: float, std: float, channels: int, origin: str) -> LatentStatistics:
    """One mean and one standard deviation of all channels."""
    # By float64, in which a number beyond float32 is no error but becomes inf, which `checked` refuses.
    means, stds = (torch.full((channels,), float(value), dtype=torch.float64).float() for value in (mean, std))
    return LatentStatistics(means, stds, origin)


def statistics_of_diffusers(entries: dict, origin: str) -> LatentStatistics | None:
    """Statistics from a diffusers config.json, if any: its latents_mean and latents_std, or its one factor.

    diffusers writes SD-VAE's factor into every config without one, so with another number of channels than SD-VAE's
    this value is no statistic.
    """
    mean, std = entries.get("latents_mean"), entries.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.from_numpy(np.array(part, dtype=np.float64)).float() for part in (mean, std))
        return LatentStatistics(mean, std, origin)
    factor, channels = entries.get("scaling_factor"), entries["latent_channels"]
    if factor is None or (factor == _SD_VAE_FACTOR and channels != _SD_VAE_CHANNELS):
        return None
    return statistics_of_factor(factor, channels, entries.get("shift_factor") or 0.0, origin)
