"""The floating-point operations of a training step of an end-to-end run."""

from __future__ import annotations

import torch

from sendvae_fast.engine.flops import forward_flops
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.discriminator_config import DiscriminatorConfig
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.train.sit.arithmetic import foundation_flops, velocity_flops
from sendvae_fast.train.vae.arithmetic import autoencoder_flops, picture_flops


def step_flops(
    autoencoder: Autoencoder,
    sit: SiT,
    foundation: Foundation,
    perceptual: Perceptual | None,
    discriminator: DiscriminatorConfig | None,
    image_size: int,
    device: torch.device,
) -> dict[str, int]:
    """FLOPs of one image by part, without what recomputation repeats.

    Of the alignment that reaches the autoencoder, the SiT's first blocks forward and back to their input.
    """
    config = sit.config
    tokens = (config.num_tokens, config.latent_channels * config.patch_size**2)

    def project() -> None:
        t, label = torch.empty(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        sit.project(torch.empty(1, *tokens, device=device), t, label)

    return {
        "autoencoder": 3 * autoencoder_flops(autoencoder, image_size, device),
        "alignment through the SiT": 2 * forward_flops(project),
        "SiT": 3 * velocity_flops(sit, device, return_features=True),
        "foundation model": foundation_flops(foundation, image_size, device),
        **picture_flops(perceptual, discriminator, image_size, device),
    }
