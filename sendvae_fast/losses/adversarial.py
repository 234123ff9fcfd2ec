"""The adversarial game between decoder and discriminator (hinge losses of VQGAN and latent-diffusion)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``0.5 (mean relu(1 - real) + mean relu(1 + fake))`` of discriminator logits of any shape; a float32 scalar."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """``-mean(fake)`` of the discriminator's logits for reconstructions; a float32 scalar."""
    return -fake.float().mean()


def adaptive_weight(nll: Tensor, g_loss: Tensor, x_hat: Tensor, last_input: Tensor) -> Tensor:
    """VQGAN's weight of the generator loss: ``|d nll / d w| / (|d g_loss / d w| + 1e-4)``, clamped to [0, 1e4].

    `nll` is the reconstruction and perceptual loss, w the weight of the decoder's last layer, a 3x3 convolution with
    padding 1 from `last_input` [B, D, H, W] to `x_hat` [B, 3, H, W]. Its gradients are worked out from those of
    `x_hat`, so that nothing below `x_hat` is differentiated and no engine's backward hooks run twice; give an alias of
    the engine's output (``output.view_as(output)``) for that. Graphs are kept for the backward pass that follows.
    A detached float32 scalar.
    """
    nll_norm, g_norm = (_last_layer_gradient(loss, x_hat, last_input).norm() for loss in (nll, g_loss))
    return (nll_norm / (g_norm + 1e-4)).clamp(0.0, 1e4)


def _last_layer_gradient(loss: Tensor, x_hat: Tensor, last_input: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, x_hat, retain_graph=True)
    shape = (x_hat.shape[1], last_input.shape[1], 3, 3)
    return torch.nn.grad.conv2d_weight(last_input.detach().float(), shape, gradient.float(), padding=1)
