"""The judge of stage 1's pictures: pixel loss, LPIPS, and a discriminator that learns beside the autoencoder.

Shape letters: B batch, S image size.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.snapshot import Snapshot, Write
from sendvae_fast.files import save_tensors
from sendvae_fast.losses.adversarial import generator_loss, hinge_discriminator_loss
from sendvae_fast.losses.known_gradient import with_known_gradient
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.losses.reconstruction import mean_psnr, reconstruction_loss
from sendvae_fast.models.weights import read_weights
from sendvae_fast.train.vae.adaptive_weight import Balance
from sendvae_fast.train.vae.networks import DISCRIMINATOR_FILE
from sendvae_fast.train.vae.settings import VAELossConfig

GAN_LIMIT = 1e4
"""Upper bound of the adaptive GAN weight's factor, VQGAN's."""


class Judgement(NamedTuple):
    """The judge's results for a batch of reconstructions."""

    loss: Tensor
    """The part of L that sees the pictures, a float32 scalar; its graph begins at the reconstruction."""
    nll_gradient: Tensor
    """Gradient of pixel loss and LPIPS, the GAN left out, at the pictures: float32 [B, 3, S, S]."""
    logged: dict[str, Tensor]
    """The terms, and other values to log."""


class PictureJudge:
    """The judge of reconstructions, whose discriminator learns from the same pass.

    Everything here is differentiated up to the pictures and no further: adaptive weights compare gradients from there
    on, and one forward of the discriminator on the reconstruction serves it and the autoencoder.

    Args:
        config: the weights.
        perceptual: LPIPS, or None for none.
        discriminator: the discriminator in training, or None for no GAN.
        last_layer: the decoder's last convolution, where an adaptive GAN weight compares gradients.
    """

    def __init__(
        self,
        config: VAELossConfig,
        perceptual: Perceptual | None,
        discriminator: Engine | None,
        last_layer: nn.Conv2d,
        distributed: Distributed,
    ) -> None:
        self.config, self.perceptual, self.discriminator = config, perceptual, discriminator
        self._distributed = distributed
        self._balance = Balance(last_layer, GAN_LIMIT, distributed) if config.gan_adaptive else None

    def gan_weight(self, step: int) -> Tensor | None:
        """A step's weight of the GAN loss, before any adaptive factor: a float32 scalar on the device.

        None before the discriminator's first step, which learns from then on.
        """
        if self.discriminator is None or step < self.config.discriminator_first_step:
            return None
        return torch.full((), self.config.gan_weight_at(step), device=self._distributed.device)

    def __call__(self, x: Tensor, reconstruction: Tensor, gan_weight: Tensor | None) -> Judgement:
        """Judge the reconstruction of images x, both [B, 3, S, S] in [-1, 1].

        With a `gan_weight` the discriminator's backward pass is in it.
        """
        reconstruction = reconstruction.float()
        x_hat = reconstruction.detach().requires_grad_()
        nll, logged = self._nll(x, x_hat)
        (nll_gradient,) = torch.autograd.grad(nll, x_hat)
        loss, gradient = nll.detach(), nll_gradient
        if self.discriminator is not None and gan_weight is not None:
            gan_gradient, terms = self._play(self.discriminator, x, x_hat)
            weight = gan_weight
            if self._balance is not None:
                weight = weight * self._balance.factor(nll_gradient, gan_gradient)
            loss, gradient = loss + weight * terms["gan"], gradient + weight * gan_gradient
            logged |= {**terms, "gan_weight": weight}
        return Judgement(with_known_gradient(loss, reconstruction, gradient), nll_gradient, logged)

    def queue_step(self, gan_weight: Tensor | None) -> Tensor | float | None:
        """Update the discriminator after the backward passes of all micro-batches: `Engine.queue_step`.

        Returns None where it does not learn.
        """
        return None if self.discriminator is None or gan_weight is None else self.discriminator.queue_step()

    def see(self, grad_norm: Tensor | float | None) -> None:
        """Take note of what `queue_step` returned: `Engine.see`."""
        if self.discriminator is not None and grad_norm is not None:
            self.discriminator.see(grad_norm)

    def _nll(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel loss plus LPIPS, weighed and reduced, and their values to log."""
        config = self.config
        logged = {"psnr": mean_psnr(x, x_hat), "reconstruction": reconstruction_loss(x, x_hat, config.reconstruction)}
        nll = config.reconstruction_weight * logged["reconstruction"]
        if self.perceptual is not None:
            logged["lpips"] = self.perceptual(x, x_hat).mean()
            nll = nll + config.perceptual_weight * logged["lpips"]
        return nll * x[0].numel() if config.reduction == "sum" else nll, logged

    def _play(self, discriminator: Engine, x: Tensor, x_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Backward pass of the discriminator's hinge loss; the generator's gradient, and both players' losses."""
        # Real and fake pass apart, as in VQGAN: batch norm takes the statistics of each by itself.
        fake, gradient = discriminator.input_gradient(x_hat, generator_loss)
        loss = hinge_discriminator_loss(discriminator(x), fake)
        discriminator.backward(loss)
        return gradient, {"gan": generator_loss(fake), "discriminator": loss}

    def snapshot(self, snapshot: Snapshot) -> Write:
        """Copy the discriminator, if there is one, and its engine's state, for a checkpoint directory. Collective."""
        if self.discriminator is None:
            return lambda directory: None
        state = self.discriminator.copy_full_state("model", snapshot)
        write_engine = self.discriminator.snapshot(snapshot)

        def write(directory: Path) -> None:
            write_engine(directory / "engine" / "discriminator")
            if self._distributed.is_main:
                save_tensors(directory / DISCRIMINATOR_FILE, state)

        return write

    def load(self, directory: Path) -> None:
        """Read what was written of a `snapshot`."""
        if self.discriminator is not None:
            self.discriminator.load_model(read_weights(directory / DISCRIMINATOR_FILE))
            self.discriminator.load(directory / "engine" / "discriminator")
