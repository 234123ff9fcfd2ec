"""A loss with a gradient computed beforehand, as a part of a graph."""

from __future__ import annotations

import torch
from torch import Tensor


def with_known_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """`value`, a scalar, such that its derivative with respect to `x` is `gradient`, of the shape of `x`.

    Losses of a network's pictures are first differentiated up to the pictures; there several gradients can be compared
    and weighed before one backward pass takes their sum through the network.
    """
    return _KnownGradient.apply(value.detach(), x, gradient)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, grad_output * gradient, None
