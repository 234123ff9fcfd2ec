"""The alignment of patch features with a frozen foundation model's."""

from __future__ import annotations

from torch import Tensor

from sendvae_fast.ops import cosine_align


def alignment_loss(features: Tensor, target: Tensor) -> Tensor:
    """Mean over patches of ``1 - cos(features, target)`` (Equation 2 of the paper; REPA's projection loss plus one).

    Both are [B, N, D] in any floating dtype; computed in float32. A float32 scalar.
    """
    return cosine_align(features, target, reduction="mean")
