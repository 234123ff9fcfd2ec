"""The floating-point operations of a training step of stage 1."""

from __future__ import annotations

import torch
from torch import Tensor

from sendvae_fast.engine.flops import forward_flops
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.discriminator import Discriminator
from sendvae_fast.models.discriminator_config import DiscriminatorConfig
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.send_vae import SendVAE
from sendvae_fast.train.sit.arithmetic import foundation_flops


def step_flops(
    model: SendVAE,
    foundation: Foundation | None,
    perceptual: Perceptual | None,
    discriminator: DiscriminatorConfig | None,
    image_size: int,
    device: torch.device,
) -> dict[str, int]:
    """FLOPs of one image by part, without what recomputation repeats, and an adaptive weight's passes."""
    parts = {"autoencoder": 3 * autoencoder_flops(model.autoencoder, image_size, device)}
    mapper = model.mapper
    if mapper is not None:
        config, grid = model.autoencoder.config, image_size // model.autoencoder.downsampling
        parts["mapper"] = 3 * forward_flops(
            lambda: mapper(torch.empty(1, config.latent_channels, grid, grid, device=device))
        )
    if foundation is not None:
        parts["foundation model"] = foundation_flops(foundation, image_size, device)
    return parts | picture_flops(perceptual, discriminator, image_size, device)


def autoencoder_flops(autoencoder: Autoencoder, image_size: int, device: torch.device) -> int:
    """FLOPs of one image's way there and back."""

    def reconstruct() -> None:
        mean, _ = autoencoder.encode(_picture(image_size, device)).chunk(2, dim=1)
        autoencoder.decode(mean)

    return forward_flops(reconstruct)


def picture_flops(
    perceptual: Perceptual | None, discriminator: DiscriminatorConfig | None, image_size: int, device: torch.device
) -> dict[str, int]:
    """FLOPs of one reconstruction's judges.

    LPIPS goes forward through both pictures and back to one of them; the discriminator forward through both, back to
    the reconstruction for the autoencoder, and back through both to its weights. It is made for the count alone.
    """
    parts = {}
    if perceptual is not None:
        both = forward_flops(lambda: perceptual(_picture(image_size, device), _picture(image_size, device)))
        parts["LPIPS"] = 3 * both // 2
    if discriminator is not None:

        def judge() -> None:
            with device:
                Discriminator(discriminator)(_picture(image_size, device))

        parts["discriminator"] = 7 * forward_flops(judge)
    return parts


def _picture(image_size: int, device: torch.device) -> Tensor:
    return torch.empty(1, 3, image_size, image_size, device=device)
