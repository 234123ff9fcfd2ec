"""How stage 1 aligns latents with a foundation model: network and loss of each method.

A method is a `LatentMapper` and a loss of its features [B, N, D] and the foundation model's [B, N, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from torch import Tensor

from sendvae_fast.losses.alignment import alignment_loss, reals_loss, vf_loss
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.mappers.latent_mapper import LatentMapper
from sendvae_fast.models.mappers.linear_mapper import LinearMapper
from sendvae_fast.models.mappers.mapper_config import MapperConfig, MapperSizes
from sendvae_fast.models.mappers.mlp_mapper import MLPMapper
from sendvae_fast.models.mappers.transformer_mapper import Mapper
from sendvae_fast.train.vae.alignment_settings import AlignmentConfig


def build_mapper(config: AlignmentConfig, latent_channels: int, grid_size: int, foundation: Foundation) -> LatentMapper:
    """The method's network from latents of `grid_size` patches per side to features of the foundation model.

    Raises UserError where the foundation model has another grid.
    """
    foundation.check_grid(grid_size)
    match config.method:
        case "send":
            sizes = {size.name: getattr(config.send, size.name) for size in fields(MapperSizes)}
            mapper = MapperConfig(
                latent_channels=latent_channels,
                grid_size=grid_size,
                target_dim=foundation.dim,
                patch_size=config.patch_size,
                **sizes,
            )
            return Mapper(mapper, config.send.noise)
        case "va":
            return LinearMapper(latent_channels, foundation.dim, config.patch_size)
        case "reals":
            reals = config.reals
            return MLPMapper(
                latent_channels, foundation.dim, width=reals.width, patch_size=config.patch_size, noise=reals.noise
            )
    raise ValueError(f"alignment method {config.method!r} has no mapper")


def build_alignment_loss(config: AlignmentConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The method's loss: features and target, [B, N, D] each, to a float32 scalar, λ_align not yet in it."""
    match config.method:
        case "send":
            return alignment_loss
        case "va":
            va = config.va
            return partial(
                vf_loss,
                cos_margin=va.cos_margin,
                distmat_margin=va.distmat_margin,
                cos_weight=va.cos_weight,
                distmat_weight=va.distmat_weight,
            )
        case "reals":
            reals = config.reals
            return partial(reals_loss, patch_weight=reals.patch_weight, global_weight=reals.global_weight)
    raise ValueError(f"alignment method {config.method!r} has no loss")
