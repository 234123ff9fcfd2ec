"""Adaptive weights that balance a loss with reconstruction and LPIPS at one layer of the autoencoder."""

from __future__ import annotations

from torch import Tensor, nn

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.losses.adaptive import Tap, adaptive_weight


class Balance:
    """The adaptive factor of a loss, from gradients with respect to the weight of one convolution.

    Gradients are averaged over ranks before their norms are compared, so that the factor, like the step, does not
    depend on the number of ranks. With gradient accumulation each micro-batch has its own.

    Args:
        layer: the convolution at which gradients are compared.
        limit: upper bound of the factor.
    """

    def __init__(self, layer: nn.Conv2d, limit: float, distributed: Distributed) -> None:
        self.tap = Tap(layer)
        self._limit, self._distributed = limit, distributed

    def factor(self, base_gradient: Tensor, gradient: Tensor) -> Tensor:
        """`adaptive_weight` of a loss, from gradients at the layer's output [B, D, H, W]; a float32 scalar."""
        mean = self._distributed.all_reduce_mean
        base, own = (mean(self.tap.weight_gradient(part)) for part in (base_gradient, gradient))
        return adaptive_weight(base, own, self._limit)
