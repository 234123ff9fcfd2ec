"""The networks of a stage 1 run, from its settings and the weights they name."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.storage import convolutional, load_autoencoder
from sendvae_fast.models.discriminator import Discriminator, load_discriminator_weights
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.latent_statistics import statistics_of_factor
from sendvae_fast.models.send_vae import SendVAE
from sendvae_fast.train.vae.alignment_methods import build_mapper
from sendvae_fast.train.vae.settings import AutoencoderTraining, VAETrainConfig

DISCRIMINATOR_FILE = "discriminator.safetensors"


class InitialAutoencoder(NamedTuple):
    """The autoencoder that a run starts from."""

    autoencoder: Autoencoder
    statistics: tuple[Tensor, Tensor] | None
    """Mean and standard deviation of its latents, each [C]; None for random weights."""


def initial_autoencoder(config: AutoencoderTraining, scaling_factor: float | None = None) -> InitialAutoencoder:
    """The autoencoder of `init_from`, or a fresh one of the sizes in the config.

    scaling_factor: what latents are multiplied by, in place of the statistics that come with the weights.

    Raises UserError where the sizes given are not those of `init_from`, or its weights cannot be read.
    """
    if config.init_from is None:
        return InitialAutoencoder(Autoencoder(config.autoencoder), None)
    saved = load_autoencoder(resolve_weights(config.init_from), scaling_factor=scaling_factor)
    autoencoder = convolutional(saved.autoencoder, f"init_from={config.init_from}")
    differences = autoencoder.config.differences(config.autoencoder)
    if differences and config.autoencoder != AutoencoderConfig():
        raise UserError(
            f"init_from={config.init_from} is not what `autoencoder` describes: {'; '.join(differences)}. Leave its "
            "settings out, or give weights of these sizes"
        )
    return InitialAutoencoder(autoencoder, (saved.latent_mean, saved.latent_std))


def tokens_per_side(autoencoder: Autoencoder, image_size: int, patch_size: int, key: str) -> int:
    """Patches of latents along a side of a picture; UserError where they do not divide it.

    key: the setting that gives `patch_size`, for the message.
    """
    tokens, remainder = divmod(image_size, autoencoder.downsampling * patch_size)
    if remainder:
        raise UserError(
            f"data.image_size={image_size} must be a multiple of the autoencoder's downsampling "
            f"{autoencoder.downsampling} times {key}={patch_size}"
        )
    return tokens


def build_model(config: VAETrainConfig, foundation: Foundation | None) -> SendVAE:
    """Autoencoder (from `init_from` or fresh) and, with a foundation model, the mapper to its features.

    Raises UserError for sizes that do not fit together.
    """
    alignment = config.alignment
    scale = alignment.latent_scale if alignment.latent_norm == "scale" else None
    autoencoder, statistics = initial_autoencoder(config, scale)
    patch_size = 1 if foundation is None else alignment.patch_size
    grid_size = tokens_per_side(autoencoder, config.data.image_size, patch_size, "alignment.patch_size")
    channels = autoencoder.config.latent_channels
    mapper = None if foundation is None else build_mapper(alignment, channels, grid_size, foundation)
    latent_norm: Any = "fixed" if scale is not None else alignment.latent_norm  # "scale" has a factor
    model = SendVAE(autoencoder, mapper, latent_norm)
    if statistics is not None:
        model.latent_norm.set_statistics(*statistics)
    elif scale is not None:
        model.latent_norm.set_statistics(*statistics_of_factor(scale, channels)[:2])
    elif alignment.latent_norm == "fixed":
        raise UserError("alignment.latent_norm=fixed needs init_from, whose latent statistics it keeps; use running")
    return model


def build_discriminator_engine(config: AutoencoderTraining, distributed: Distributed) -> Engine | None:
    """The discriminator in training, or None where the GAN loss has no weight."""
    if config.loss.gan_weight == 0:
        return None
    with distributed.all_or_none():
        discriminator = build_discriminator(config, distributed)
    # `Engine.input_gradient` needs whole parameters, and splitting 3 million of them would save nothing.
    whole = config.engine.with_whole_parameters()
    return build_engine(discriminator, config.discriminator_optimizer, whole, distributed)


def build_discriminator(config: AutoencoderTraining, distributed: Distributed) -> Discriminator:
    """The discriminator, from `discriminator_from` or fresh, synchronised over ranks where that is asked for.

    Raises UserError where the weights do not fit, or its batch norm cannot be synchronised on this device.
    """
    num_layers = config.discriminator.num_layers
    if config.data.image_size < (smallest := 3 * 2**num_layers):
        raise UserError(
            f"discriminator.num_layers={num_layers} judges pictures of at least {smallest} pixels, data.image_size is "
            f"{config.data.image_size}: take fewer layers"
        )
    discriminator = Discriminator(config.discriminator)
    if config.discriminator_from is not None:
        weights = resolve_weights(config.discriminator_from)
        load_discriminator_weights(discriminator, weights / DISCRIMINATOR_FILE if weights.is_dir() else weights)
    if not config.discriminator.sync_batch_norm or distributed.world_size == 1:
        return discriminator
    if distributed.device.type != "cuda":
        # PyTorch has it for GPUs alone. Several ranks on a CPU are for trials: not worth one of our own.
        raise UserError(
            f"discriminator.sync_batch_norm works on GPUs, and {distributed.world_size} ranks are on "
            f"{distributed.device.type}: leave it out, or use discriminator.norm=group, which needs no other rank"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)  # pyright: ignore[reportReturnType] - its parts
