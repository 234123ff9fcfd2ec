"""Latents fresh from a generator, which is first made sure to be one of the autoencoder's latents."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.origins import weights_origin
from sendvae_fast.evaluation.result import WeightsOrigin
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.progress import Progress
from sendvae_fast.reading import read_yaml
from sendvae_fast.sampling.generate import LatentSampler, check_fit
from sendvae_fast.sampling.settings import GenerateConfig


class DrawnLatents(NamedTuple):
    """Of a generator."""

    z: Tensor
    """[n, C, H, W], as the decoder takes them."""
    autoencoder: ImageAutoencoder
    weights: dict[str, WeightsOrigin]
    """Of the generator, by its role."""

    def decode(self, z: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, S, S] of latents."""
        return to_uint8(self.autoencoder.decode(z))


def draw_latents(
    generator: str, weights: Path, autoencoder: ImageAutoencoder, config: GenerateConfig, device: torch.device
) -> DrawnLatents:
    """Draw `config.num_samples` latents of a generator on a device, where the autoencoder is moved, too.

    Args:
        generator: run of stage 2, or weights.
        weights: where the autoencoder was loaded from, for messages.
        autoencoder: the one that made the generator's latents.
        config: how latents are drawn.
        device: where.

    Raises:
        UserError: weights are missing, or the generator was trained on latents of another autoencoder.
    """
    path = resolve_weights(generator)
    _check_autoencoder(path, weights, autoencoder)
    saved = load_sit(path)
    check_fit(saved.sit.config, autoencoder, config)
    origin = weights_origin(path, saved.sit)
    draw = LatentSampler(saved.sit.to(device), config, device)
    mean, std = (part.to(device).view(1, -1, 1, 1) for part in (saved.latent_mean, saved.latent_std))
    parts = []
    with Progress("drawing latents", config.num_samples, unit="latent") as progress:
        for ids in torch.arange(config.num_samples, device=device).split(config.batch_size):
            parts.append(draw(ids)[1] * std + mean)
            progress.advance(len(ids))
    return DrawnLatents(torch.cat(parts), autoencoder.to(device), {"generator": origin})


def _check_autoencoder(generator: Path, weights: Path, autoencoder: ImageAutoencoder) -> None:
    """Raise UserError if the generator's run names an autoencoder of other weights; one that is gone is not asked."""
    run = run_of(generator)
    named = None if run is None else read_yaml(run / "config.yaml", "give another generator").get("autoencoder")
    if not isinstance(named, str) or not Path(named).exists():
        return
    other = resolve_weights(named)
    if weights_sha256(load_autoencoder(other).autoencoder.state_dict()) != weights_sha256(autoencoder.state_dict()):
        raise UserError(f"the generator {generator} was trained on latents of {other}, not of {weights}: give that one")
