"""The floating-point operations of a training step of stage 2."""

from __future__ import annotations

import torch

from sendvae_fast.engine.flops import forward_flops
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.sit.sit import SiT


def step_flops(model: SiT, foundation: Foundation | None, image_size: int, device: torch.device) -> dict[str, int]:
    """FLOPs of one image by part, without what recomputation repeats.

    Thrice the SiT's forward with its projector, and the foundation model's forward.
    """
    parts = {"SiT": 3 * velocity_flops(model, device, return_features=foundation is not None)}
    if foundation is not None:
        parts["foundation model"] = foundation_flops(foundation, image_size, device)
    return parts


def velocity_flops(model: SiT, device: torch.device, *, return_features: bool) -> int:
    """FLOPs of one image's forward pass."""
    config = model.config

    def velocity() -> None:
        latent = torch.empty(1, *config.latent_shape, device=device)
        t, label = torch.empty(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        model(latent, t, label, return_features=return_features)

    return forward_flops(velocity)


def foundation_flops(foundation: Foundation, image_size: int, device: torch.device) -> int:
    """FLOPs of one image's features."""
    return forward_flops(
        lambda: foundation(torch.empty(1, 3, image_size, image_size, dtype=torch.uint8, device=device))
    )
