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


def adaptive_weight(nll_gradient: Tensor, g_gradient: Tensor, last_input: Tensor) -> Tensor:
    """VQGAN's weight of the generator loss: ``|d nll / d w| / (|d g_loss / d w| + 1e-4)``, clamped to [0, 1e4].

    `nll` is the reconstruction and perceptual loss, w the weight of the decoder's last layer, a 3x3 convolution with
    padding 1 from `last_input` [B, D, H, W] to the reconstruction. Both gradients are with respect to the
    reconstruction [B, 3, H, W]: those of w follow from them, and nothing below is differentiated. A float32 scalar
    without a graph.
    """
    nll_norm, g_norm = (_last_layer_gradient(gradient, last_input).norm() for gradient in (nll_gradient, g_gradient))
    return (nll_norm / (g_norm + 1e-4)).clamp(0.0, 1e4)


def _last_layer_gradient(gradient: Tensor, last_input: Tensor) -> Tensor:
    shape = (gradient.shape[1], last_input.shape[1], 3, 3)
    return torch.nn.grad.conv2d_weight(last_input.detach().float(), shape, gradient.float(), padding=1)
