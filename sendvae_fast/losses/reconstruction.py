"""Losses that hold the autoencoder's pictures and its posterior."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from sendvae_fast.models.autoencoder import LOGVAR_RANGE


def reconstruction_loss(x: Tensor, x_hat: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Mean absolute (``l1``, as REPA-E's code) or squared (``l2``, as the papers print) difference; a float32 scalar.

    Both images are [B, 3, H, W] in [-1, 1]. ValueError for another kind.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind must be l1 or l2, got {kind!r}")
    distance = F.l1_loss if kind == "l1" else F.mse_loss
    return distance(x_hat.float(), x.float())


def kl_loss(moments: Tensor) -> Tensor:
    """KL divergence of the posterior from N(0, 1): summed over [C, H, W], averaged over the batch; a float32 scalar.

    ``0.5 sum(mean² + var - 1 - logvar)`` with moments [B, 2C, H, W] = (mean, log-variance), the latter clamped to
    [-30, 20] as in latent-diffusion.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1).mean()
