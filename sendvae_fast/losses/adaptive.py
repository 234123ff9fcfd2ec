"""Adaptive weights, by which the gradient of one loss balances another's at a layer (VQGAN, VA-VAE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


class Tap:
    """The input and the output of a module in its latest forward pass, with their graph.

    An engine's backward hooks lie between its output and the losses, and must run once per step. A tap lies below them:
    differentiation from tap to tap runs no hook. Not for engines that split weights (ZeRO 3).
    """

    input: Tensor
    output: Tensor

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        module.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self.input, self.output = arguments[0], output

    def gradient(self, of: Tap, seed: Tensor) -> Tensor:
        """Gradient of `of`'s output with respect to this output, for a gradient `seed` of the former; graphs stay."""
        seed = seed.to(of.output.dtype).reshape(of.output.shape)
        (gradient,) = torch.autograd.grad(of.output, self.output, seed, retain_graph=True)
        return gradient

    def weight_gradient(self, output_gradient: Tensor) -> Tensor:
        """Gradient with respect to the weight of this convolution, float32, from that of its output [B, D, H, W]."""
        conv: Any = self.module
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        return conv2d_weight(
            self.input.detach().float(),
            shape,
            output_gradient.float(),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )


def adaptive_weight(base_gradient: Tensor, gradient: Tensor, limit: float) -> Tensor:
    """``|base_gradient| / (|gradient| + 1e-4)`` clamped to [0, limit]: a float32 scalar without graph.

    Both are gradients with respect to one layer's weight: of the loss that sets the scale, and of the loss to weigh.
    """
    return (base_gradient.norm() / (gradient.norm() + 1e-4)).clamp(0.0, limit).detach()
