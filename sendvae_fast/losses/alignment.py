"""The alignment of patch features with a frozen foundation model's: one loss per method.

Features and target are [B, N, D] in any floating dtype; sums are float32. Gradients reach the features alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sendvae_fast.models.precision import no_autocast
from sendvae_fast.ops import cosine_align


def alignment_loss(features: Tensor, target: Tensor) -> Tensor:
    """Mean over patches of ``1 - cos(features, target)`` (Equation 2 of the paper; REPA's projection loss plus one).

    A float32 scalar.
    """
    return cosine_align(features, target, reduction="mean")


def vf_loss(
    features: Tensor,
    target: Tensor,
    *,
    cos_margin: float = 0.5,
    distmat_margin: float = 0.25,
    cos_weight: float = 1.0,
    distmat_weight: float = 1.0,
) -> Tensor:
    """VA-VAE's VF loss (arXiv:2501.01423, Section 3): the sum of two terms, each with its margin and weight.

        cos_weight mean_n relu(1 - cos_margin - cos(f_n, y_n))
        distmat_weight mean_nm relu(|cos(f_n, f_m) - cos(y_n, y_m)| - distmat_margin)

    A float32 scalar.
    """
    cosine = cosine_align(features, target, reduction="mean", margin=cos_margin)
    return cos_weight * cosine + distmat_weight * distance_matrix_loss(features, target, distmat_margin)


def distance_matrix_loss(features: Tensor, target: Tensor, margin: float) -> Tensor:
    """Mean over pairs of patches of ``relu(|cos(f_n, f_m) - cos(y_n, y_m)| - margin)``; a float32 scalar.

    Until the backward pass it keeps two matrices of 4 N² bytes per image, and 8 N D bytes of features: 2 MiB per image
    for N = 256 and D = 768. Three such matrices exist at once. Patches of norm 0 have cosine 0.
    """
    with no_autocast(features):
        difference = _cosines(features) - _cosines(target.detach())
        # relu(|d| - margin), with one matrix less than written out.
        return F.softshrink(difference, margin).abs().mean()


def reals_loss(features: Tensor, target: Tensor, *, patch_weight: float = 1.0, global_weight: float = 1.0) -> Tensor:
    """ReaLS (arXiv:2502.00359): alignment of every patch, and of the picture as a whole; a float32 scalar.

        patch_weight mean_n (1 - cos(f_n, y_n)) + global_weight (1 - cos(mean_n f_n, mean_n y_n))

    The paper gives the two levels, not the distance or its weights: here cosine and 1, as in all losses here. The
    picture's feature is the mean over patches on both sides, as foundation models here give no class token.
    """
    pooled = (part.float().mean(dim=1, keepdim=True) for part in (features, target))
    return patch_weight * cosine_align(features, target) + global_weight * cosine_align(*pooled)


def _cosines(x: Tensor) -> Tensor:
    """Cosine of every pair of patches: [B, N, D] to float32 [B, N, N]."""
    unit = F.normalize(x.float(), dim=-1)
    return unit @ unit.mT
