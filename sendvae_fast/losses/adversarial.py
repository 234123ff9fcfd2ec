"""The adversarial game between decoder and discriminator (hinge losses of VQGAN and latent-diffusion)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``0.5 (mean relu(1 - real) + mean relu(1 + fake))`` of discriminator logits of any shape; a float32 scalar."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """``-mean(fake)`` of the discriminator's logits for reconstructions; a float32 scalar."""
    return -fake.float().mean()
