"""The floating-point operations of a training step of stage 2."""

from __future__ import annotations

import torch

from sendvae_fast.engine.flops import forward_flops
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.sit.sit import SiT


def step_flops(model: SiT, foundation: Foundation | None, image_size: int, device: torch.device) -> int:
    """FLOPs of one image: thrice the SiT's forward, and the foundation model's, without what recomputation repeats."""
    config = model.config

    def velocity() -> None:
        latent = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size, device=device)
        t, label = torch.empty(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        model(latent, t, label, return_features=foundation is not None)

    total = 3 * forward_flops(velocity)
    if foundation is not None:
        total += forward_flops(
            lambda: foundation(torch.empty(1, 3, image_size, image_size, dtype=torch.uint8, device=device))
        )
    return total
