"""The floating-point operations of a training step of stage 1."""

from __future__ import annotations

import torch

from sendvae_fast.engine.flops import forward_flops
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.send_vae import SendVAE


def step_flops(
    model: SendVAE, foundation: Foundation | None, perceptual: Perceptual | None, image_size: int, device: torch.device
) -> int:
    """FLOPs of one image: networks in training thrice their forward, LPIPS' own backward once, frozen ones forward.

    Without the discriminator, and without what recomputation repeats.
    """
    autoencoder, mapper = model.autoencoder, model.mapper

    def picture() -> torch.Tensor:
        return torch.empty(1, 3, image_size, image_size, device=device)

    def trained() -> None:
        mean, _ = autoencoder.encode(picture()).chunk(2, dim=1)
        autoencoder.decode(mean)
        if mapper is not None:
            mapper(mean)

    total = 3 * forward_flops(trained)
    if foundation is not None:
        total += forward_flops(lambda: foundation(picture().to(torch.uint8)))
    if perceptual is not None:
        total += 3 * forward_flops(lambda: perceptual(picture(), picture())) // 2  # backward: through one of the two
    return total
