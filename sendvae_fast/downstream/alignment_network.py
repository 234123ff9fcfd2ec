"""The alignment network that a run of stage 1 keeps: from a latent to features of the foundation model.

Shape letters: B batch, C latent channels, H W latent size, P patch size, N tokens, D width of the foundation model.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sendvae_fast.config import build_config
from sendvae_fast.engine.run_weights import run_of
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.foundation.foundation import Foundation, load_foundation
from sendvae_fast.models.mappers.latent_mapper import LatentMapper
from sendvae_fast.models.weights import load_weights, read_weights
from sendvae_fast.reading import read_yaml
from sendvae_fast.train.vae.alignment_methods import build_mapper
from sendvae_fast.train.vae.alignment_settings import AlignmentConfig
from sendvae_fast.train.vae.networks import tokens_per_side
from sendvae_fast.train.vae.stage import MAPPER_FILE


class AlignmentNetwork(NamedTuple):
    """A run's mapper, with the foundation model that it was trained towards."""

    mapper: LatentMapper
    foundation: Foundation
    latent_mean: Tensor
    """[C], of the latents that the mapper was trained on."""
    latent_std: Tensor
    """[C]"""
    patch_size: int
    """P, latent positions per token and side."""

    def to(self, device: torch.device) -> AlignmentNetwork:
        """The same on a device."""
        return self._replace(
            mapper=self.mapper.to(device),
            foundation=self.foundation.to(device),
            latent_mean=self.latent_mean.to(device),
            latent_std=self.latent_std.to(device),
        )

    def features(self, z: Tensor) -> Tensor:
        """Features [B, N, D] of latents [B, C, H, W] as the decoder takes them, without noise."""
        if self.mapper.reads == "z":
            return self.mapper(z)
        z_t = self.normalised(z)
        return self.mapper(z_t if self.mapper.patch_size is None else patches(z_t, self.mapper.patch_size))

    def normalised(self, z: Tensor) -> Tensor:
        """Latents [B, C, H, W] with mean 0 and deviation 1 by channel over the run's pictures."""
        return (z - self.latent_mean.view(1, -1, 1, 1)) / self.latent_std.view(1, -1, 1, 1)


def patches(z: Tensor, patch_size: int) -> Tensor:
    """Latents [B, C, H, W] as flattened patches [B, N, C P P], row-major, as `ops.noise_inject` gives them."""
    return F.pixel_unshuffle(z, patch_size).flatten(2).transpose(1, 2)


def load_alignment_network(
    weights: Path, autoencoder: ImageAutoencoder, image_size: int, foundation_weights: str | None = None
) -> AlignmentNetwork:
    """The alignment network beside an autoencoder's weights, on the CPU, in evaluation mode.

    Args:
        weights: a checkpoint of a run of stage 1, as `resolve_weights` gives it.
        autoencoder: the one that lies there.
        image_size: side of the pictures in pixels.
        foundation_weights: file of the foundation model, where it is no longer where the run had it.

    Raises:
        UserError: the weights are in no run of stage 1, the run had no alignment, or the foundation model is missing or
            does not fit.
    """
    run, file = run_of(weights), weights / MAPPER_FILE
    if run is None or not file.is_file() or not isinstance(autoencoder, Autoencoder):
        raise UserError(
            f"{weights} has no alignment network ({MAPPER_FILE} in a checkpoint of `sendvae train vae`): give a run of "
            "stage 1, or a checkpoint in one"
        )
    state = read_weights(file)
    own = {name.removeprefix("mapper."): value for name, value in state.items() if name.startswith("mapper.")}
    if not own:
        raise UserError(f"{run} was trained without alignment: give a run whose alignment.method is not none")
    remedy = "give another run"
    content = read_yaml(run / "config.yaml", remedy).get("alignment", {})
    if foundation_weights is not None:
        content = {**content, "foundation": {**content.get("foundation", {}), "weights": foundation_weights}}
    config = build_config(AlignmentConfig, content, f"alignment in {run / 'config.yaml'}")
    foundation = load_foundation(config.foundation)
    grid_size = tokens_per_side(autoencoder, image_size, config.patch_size, "alignment.patch_size")
    mapper = build_mapper(config, autoencoder.config.latent_channels, grid_size, foundation)
    load_weights(mapper, own, file)
    mean, std = state["latent_norm.running_mean"], state["latent_norm.running_var"].sqrt()
    if config.latent_norm == "none":
        mean, std = mean.new_zeros(mean.shape), std.new_ones(std.shape)
    return AlignmentNetwork(mapper.eval().requires_grad_(False), foundation, mean, std, config.patch_size)
