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


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
    """VQGAN's weight of the generator loss: ``|d nll / d w| / (|d g_loss / d w| + 1e-4)``, clamped to [0, 1e4].

    `nll` is the reconstruction and perceptual loss, `last_layer` the decoder's last weight (`Autoencoder.last_layer`).
    Both graphs are kept for the backward pass that follows. A detached scalar.
    """
    nll_norm = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].norm()
    g_norm = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0].norm()
    return (nll_norm / (g_norm + 1e-4)).clamp(0.0, 1e4).detach()
