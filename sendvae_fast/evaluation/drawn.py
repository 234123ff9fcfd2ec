"""Samples to measure: pictures that a generator draws as they are asked for, and folders of drawn ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sendvae_fast.config import plain
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.evaluation.origins import weights_origin
from sendvae_fast.evaluation.pictures import Pictures
from sendvae_fast.evaluation.result import PicturesOrigin, WeightsOrigin
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.reading import count_in, dataclass_of, read_yaml, reading
from sendvae_fast.sampling.generate import LatentDecoder, check_fit, generate
from sendvae_fast.sampling.sample_to_folder import SETTINGS_FILE
from sendvae_fast.sampling.settings import GenerateConfig

NOT_THE_PICTURES = ("num_samples", "batch_size", "cuda_graphs")
"""Settings that do not decide what a picture looks like."""


class DrawnPictures(Pictures):
    """The pictures that `sendvae sample` would write, drawn when they are asked for.

    Args:
        sit: on the device that draws.
        decoder: there too.
        config: how pictures are drawn.
        ema: whether `sit` has the averaged weights.
        weights: of the two networks, as ``generator`` and ``autoencoder``.
    """

    def __init__(
        self, sit: SiT, decoder: LatentDecoder, config: GenerateConfig, ema: bool, weights: dict[str, WeightsOrigin]
    ) -> None:
        self._sit, self._decoder, self._config, self.weights = sit, decoder, config, weights
        settings = {key: value for key, value in plain(config).items() if key not in NOT_THE_PICTURES} | {"ema": ema}
        decisive = [settings, *(weights[role].sha256 for role in ("generator", "autoencoder"))]
        self.origin = PicturesOrigin(
            path=weights["generator"].path,
            num_pictures=config.num_samples,
            image_size=decoder.autoencoder.image_size(sit.config.latent_shape),
            sha256=hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest(),
            hash_of="settings",
            settings=settings,
        )

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        device = next(self._sit.parameters()).device
        ids = torch.arange(start, len(self) if stop is None else stop, device=device)
        config = replace(self._config, batch_size=batch_size)
        for batch in generate(self._sit, self._decoder, ids, config):
            yield batch.images


def open_drawn(
    generator: str, autoencoder: str, config: GenerateConfig, ema: bool, device: torch.device
) -> DrawnPictures:
    """The pictures of networks on disk.

    Args:
        generator: SiT folder, checkpoint or run.
        autoencoder: the one that made its latents.
        config: how pictures are drawn.
        ema: whether the averaged weights draw.
        device: where.

    Raises:
        UserError: weights are missing, or do not belong together.
    """
    paths = resolve_weights(generator), resolve_weights(autoencoder)
    saved, decoder = load_sit(paths[0], ema=ema), load_autoencoder(paths[1]).autoencoder
    check_fit(saved.sit.config, decoder, config)
    weights = {
        "generator": weights_origin(paths[0], saved.sit),
        "autoencoder": weights_origin(paths[1], decoder),
    }
    way_back = LatentDecoder(decoder.to(device), saved.latent_mean, saved.latent_std)
    return DrawnPictures(saved.sit.to(device), way_back, config, ema, weights)


def sampling_settings(folder: str | Path) -> dict[str, Any]:
    """The settings that `sendvae sample` noted beside its pictures; empty where there are none.

    Raises:
        UserError: the file is damaged, or is none of `sendvae sample`.
    """
    path, remedy = Path(folder) / SETTINGS_FILE, "repair it, or remove it to measure the pictures without settings"
    if not path.is_file():
        return {}
    settings = read_yaml(path, remedy)
    with reading(path, remedy):
        json.dumps(settings)  # as a result holds them
        count_in({"num_samples": 0} | settings, "num_samples")
        weights_of_samples(settings)
    return settings


def weights_of_samples(settings: dict[str, Any]) -> dict[str, WeightsOrigin]:
    """The networks that drew the pictures of a folder with these settings. NotOfItsKind if they say something else."""
    return {
        role: dataclass_of(
            WeightsOrigin,
            {"path": settings[role], "sha256": settings[f"{role}_sha256"], "step": settings.get(f"{role}_step")},
        )
        for role in ("generator", "autoencoder")
        if role in settings and f"{role}_sha256" in settings
    }
