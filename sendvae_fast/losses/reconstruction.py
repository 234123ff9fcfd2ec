"""Losses of the autoencoder's pictures and posterior, and the PSNR that monitors a run."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sendvae_fast.models.autoencoder.image_autoencoder import LOGVAR_RANGE


def reconstruction_loss(x: Tensor, x_hat: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Mean absolute (``l1``, as REPA-E's code) or squared (``l2``, as the papers print) difference; a float32 scalar.

    Both images are [B, 3, H, W] in [-1, 1]. ValueError for another kind.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind must be l1 or l2, got {kind!r}")
    distance = F.l1_loss if kind == "l1" else F.mse_loss
    return distance(x_hat.float(), x.float())


@torch.no_grad()
def mean_psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """PSNR in dB, averaged over pictures, to monitor a run; a float32 scalar.

    ``10 log10(4 / mse)`` of pictures [B, 3, H, W] in [-1, 1], the reconstruction clamped to that range but, unlike in
    `evaluation.reconstruction_quality`, not rounded to uint8. Capped at 100 dB.
    """
    mse = (x_hat.float().clamp(-1, 1) - x.float()).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / mse)).clamp(max=100.0).mean()


def kl_loss(moments: Tensor) -> Tensor:
    """KL divergence of the posterior from N(0, 1): summed over [C, H, W], averaged over the batch; a float32 scalar.

    ``0.5 sum(mean² + var - 1 - logvar)`` with moments [B, 2C, H, W] = (mean, log-variance), the latter clamped to
    [-30, 20] as in latent-diffusion.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1).mean()
