"""The network of stage 1: an autoencoder whose noised latents are mapped to a foundation model's features.

Equations 1-3 of the paper, without the losses. Shape letters: B batch, C latent channels, H W latent size, N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.mappers.latent_mapper import LatentMapper
from sendvae_fast.models.noise_injection import LatentNormKind, NoiseInjection

_AUTOENCODER = "autoencoder."


class SendVAEOutput(NamedTuple):
    """What stage 1's losses need of one forward pass."""

    reconstruction: Tensor  # [B, 3, S, S]
    moments: Tensor  # [B, 2C, H, W]
    features: Tensor | None  # [B, N, target_dim], the foundation model's width; None without a mapper


class SendVAE(nn.Module):
    """Autoencoder and mapper trained as one network; a run without alignment has no mapper.

    Args:
        autoencoder: the autoencoder to train.
        mapper: h of Equation 2, or None for a run without alignment.
        latent_norm: see `NoiseInjection`.
    """

    def __init__(
        self, autoencoder: Autoencoder, mapper: LatentMapper | None, latent_norm: LatentNormKind = "running"
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.mapper = mapper
        self.latent_norm = NoiseInjection(autoencoder.config.latent_channels, latent_norm)

    def forward(self, x: Tensor, key: Tensor, sample_ids: Tensor) -> SendVAEOutput:
        """Images [B, 3, S, S] in [-1, 1], the step's random key and the samples' ids [B] to a `SendVAEOutput`."""
        moments = self.autoencoder.encode(x)
        mean, logvar = moments.chunk(2, dim=1)
        mapper = self.mapper
        t = None if mapper is not None and mapper.noise else torch.zeros(x.shape[0], device=x.device)
        patch_size = None if mapper is None else mapper.patch_size
        latents = self.latent_norm(mean, logvar, key, sample_ids, t, patch_size=patch_size, need_velocity=False)
        features = None if mapper is None else mapper(getattr(latents, mapper.reads))
        # Aliases, as engines hang hooks on outputs: gradients from inside to inside (`losses.adaptive`) meet none.
        reconstruction = self.autoencoder.decode(latents.z)
        features = None if features is None else features.view_as(features)
        return SendVAEOutput(reconstruction.view_as(reconstruction), moments.view_as(moments), features)


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a `SendVAE` as its autoencoder's own, and the rest: mapper and latent statistics."""
    own = {name: value for name, value in state.items() if name.startswith(_AUTOENCODER)}
    rest = {name: value for name, value in state.items() if name not in own}
    return {name.removeprefix(_AUTOENCODER): value for name, value in own.items()}, rest


def join_state(autoencoder: dict[str, Tensor], rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `SendVAE` from what `split_state` made of it."""
    return {**{f"{_AUTOENCODER}{name}": value for name, value in autoencoder.items()}, **rest}
