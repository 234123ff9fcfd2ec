"""The losses of a flow's velocity field. Shape letters: B batch, C latent channels, H W latent size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sendvae_fast.ops import cosine_align


def velocity_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean of ``(velocity - target)²`` over all elements (flow matching with the linear path).

    Both are [B, C, H, W] in any floating dtype; computed in float32. A float32 scalar.
    """
    return F.mse_loss(velocity.float(), target.float())


def velocity_direction_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean over latent positions of ``1 - cos(velocity, target)``, the cosine taken over channels.

    FasterDiT's addition to the velocity loss (Yao et al., 2024), which LightningDiT weighs as much as the loss itself.
    Both are [B, C, H, W] in any floating dtype; computed in float32. A float32 scalar.
    """
    # [B, C, H, W] -> [B, H W, C]
    return cosine_align(velocity.flatten(2).mT, target.flatten(2).mT)
