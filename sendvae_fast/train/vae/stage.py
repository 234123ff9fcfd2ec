"""Stage 1: train an autoencoder whose noised latents align with a frozen foundation model.

L = λ_align L_align + L_VAE (Equation 3 of the paper), with L_VAE = reconstruction + LPIPS + GAN + KL as REPA-E weighs
them. Shape letters: B batch, S image size, C latent channels, H W latent size, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.files import save_tensors
from sendvae_fast.image_grid import save_grid
from sendvae_fast.losses.adversarial import generator_loss, hinge_discriminator_loss
from sendvae_fast.losses.known_gradient import with_known_gradient
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.losses.reconstruction import kl_loss, mean_psnr, reconstruction_loss
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.storage import WEIGHTS_FILE, save_autoencoder
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.models.send_vae import join_state, split_state
from sendvae_fast.models.weights import read_weights
from sendvae_fast.ops import philox
from sendvae_fast.train.accumulation import add_means, micro_batches
from sendvae_fast.train.frozen_networks import build_foundation, frozen_network
from sendvae_fast.train.loop import fit
from sendvae_fast.train.training_images import HOW_IMAGES_ARE_READ, TrainingImages
from sendvae_fast.train.vae.alignment_methods import build_alignment_loss
from sendvae_fast.train.vae.balance import GradientBalance
from sendvae_fast.train.vae.networks import DISCRIMINATOR_FILE, build_discriminator, build_model
from sendvae_fast.train.vae.settings import VAETrainConfig

MAPPER_FILE = "mapper.safetensors"


class VAEStage:
    """Stage 1 behind the loop's interface (`train.loop.Stage`)."""

    title = "train vae"
    NUM_PREVIEW_IMAGES = 8

    def __init__(self, config: VAETrainConfig, images: TrainingImages, distributed: Distributed) -> None:
        self.config, self.images, self.distributed = config, images, distributed
        self.device = distributed.device
        alignment = config.alignment
        self.foundation = build_foundation(alignment.lambda_align, alignment.foundation, config.engine, self.device)
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.foundation)
        self.alignment_loss = build_alignment_loss(alignment)
        self.perceptual = None
        if config.loss.perceptual is not None:
            self.perceptual = frozen_network(Perceptual(config.loss.perceptual), config.engine, self.device)
        self.engine = build_engine(self.model, config.optimizer, config.engine, distributed)
        self.balance = GradientBalance(self.model, config, distributed)
        self.discriminator_engine = None
        if config.loss.gan_weight > 0:
            # `Engine.input_gradient` needs whole parameters, and splitting 3 million of them would save nothing.
            self.discriminator_engine = build_engine(
                build_discriminator(config, distributed),
                config.discriminator_optimizer,
                config.engine.with_whole_parameters(),
                distributed,
            )

    # -- one step, read aloud ------------------------------------------------------------------------------------

    def train_step(self, step: int, batch: ImageBatch) -> dict[str, Tensor | float]:
        """One step of autoencoder and mapper and one of the discriminator, over the accumulated micro-batches."""
        key = philox.make_key(self.config.seed, step, self.device)
        has_discriminator = self.discriminator_engine is not None
        discriminates = has_discriminator and step >= self.config.loss.discriminator_first_step
        logged: dict[str, Tensor | float] = {}
        for micro in micro_batches(batch, self.config.engine.accumulation_steps, self.device):
            x = to_model_range(micro.images)
            target = None if self.foundation is None else self.foundation(micro.images)
            output = self.engine(x, key, micro.ids)
            loss, parts, nll_gradient = self._judge_pictures(x, output.reconstruction.float(), step, discriminates)
            parts["kl"] = kl_loss(output.moments)
            loss = loss + self.config.loss.kl_weight * parts["kl"]
            if target is not None:
                features = output.features.view_as(output.features)  # an alias: see GradientBalance
                parts["align"] = self.alignment_loss(features, target)
                factor = self.balance.of_alignment(nll_gradient, parts["align"], features)
                parts["align_weight"] = loss.new_full((), self.config.alignment.lambda_align) * factor
                loss = loss + parts["align_weight"] * parts["align"]
            self.engine.backward(loss)
            add_means(logged, {"loss": loss, **parts}, self.config.engine.accumulation_steps)
        logged["grad_norm"] = self.engine.step().grad_norm
        if discriminates:
            self.discriminator_engine.step()
        return logged

    def _judge_pictures(
        self, x: Tensor, reconstruction: Tensor, step: int, discriminates: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The part of L that sees the reconstruction, its terms, and the gradient of what is not the GAN's at the
        pictures; the discriminator's backward on the way.

        Everything here is differentiated up to the pictures and no further: adaptive weights compare gradients from
        there on, and one forward of the discriminator on the fake serves it and the autoencoder.
        """
        weights, x_hat = self.config.loss, reconstruction.detach().requires_grad_()
        parts = {"psnr": mean_psnr(x, x_hat), "reconstruction": reconstruction_loss(x, x_hat, weights.reconstruction)}
        loss = weights.reconstruction_weight * parts["reconstruction"]
        if self.perceptual is not None:
            parts["lpips"] = self.perceptual(x, x_hat).mean()
            loss = loss + weights.perceptual_weight * parts["lpips"]
        if weights.reduction == "sum":
            loss = loss * x[0].numel()
        (nll_gradient,) = torch.autograd.grad(loss, x_hat)
        loss, gradient = loss.detach(), nll_gradient
        if discriminates:
            game, gan_gradient = self._play(x, x_hat)
            parts |= game
            # `new_full`, here and above: `new_tensor` copies from the host, which then waits for the GPU.
            scheduled = loss.new_full((), weights.gan_weight_at(step))
            gan_weight = scheduled * self.balance.of_gan(nll_gradient, gan_gradient)
            parts["gan_weight"] = gan_weight
            loss, gradient = loss + gan_weight * parts["gan"], nll_gradient + gan_weight * gan_gradient
        return with_known_gradient(loss, reconstruction, gradient), parts, nll_gradient

    def _play(self, x: Tensor, x_hat: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Backward of the hinge loss for the discriminator; both players' losses, and the generator's gradient."""
        # Real and fake pass apart, as in VQGAN: batch norm takes the statistics of each by itself.
        fake, gradient = self.discriminator_engine.input_gradient(x_hat, generator_loss)
        loss = hinge_discriminator_loss(self.discriminator_engine(x), fake)
        self.discriminator_engine.backward(loss)
        return {"gan": generator_loss(fake), "discriminator": loss}, gradient

    # -- the rest of the loop's interface ------------------------------------------------------------------------

    def batches(self, start_step: int) -> Iterator[ImageBatch]:
        """This rank's batches from `start_step` on."""
        return self.images.batches(start_step)

    def save(self, directory: Path) -> None:
        """An autoencoder folder with mapper, discriminator and engine state beside it."""
        state = self.engine.full_state("model")
        self.engine.save(directory / "engine" / "vae")
        discriminator_state = None
        if self.discriminator_engine is not None:
            discriminator_state = self.discriminator_engine.full_state("model")
            self.discriminator_engine.save(directory / "engine" / "discriminator")
        if not self.distributed.is_main:
            return
        autoencoder = Autoencoder(self.model.autoencoder.config)
        autoencoder_state, rest = split_state(state)
        autoencoder.load_state_dict(autoencoder_state)
        save_autoencoder(directory, autoencoder, *self.model.latent_norm.statistics())
        save_tensors(directory / MAPPER_FILE, rest)
        if discriminator_state is not None:
            save_tensors(directory / DISCRIMINATOR_FILE, discriminator_state)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        self.engine.load_model(
            join_state(read_weights(directory / WEIGHTS_FILE), read_weights(directory / MAPPER_FILE))
        )
        self.engine.load(directory / "engine" / "vae")
        if self.discriminator_engine is not None:
            self.discriminator_engine.load_model(read_weights(directory / DISCRIMINATOR_FILE))
            self.discriminator_engine.load(directory / "engine" / "discriminator")

    @torch.no_grad()
    def preview(self, step: int, directory: Path) -> None:
        """The first images of the data over their reconstructions, as `reconstruction_<step>.png`."""
        images = self.images.spread(self.NUM_PREVIEW_IMAGES).to(self.device)
        ids = torch.arange(len(images), device=self.device)
        self.model.eval()
        output = self.engine(to_model_range(images), philox.make_key(self.config.seed, step, self.device), ids)
        self.model.train()
        if self.distributed.is_main:
            pictures = torch.cat([images, to_uint8(output.reconstruction)])
            save_grid(directory / f"reconstruction_{step:08d}.png", pictures, columns=len(images))


def train_vae(config: VAETrainConfig) -> int:
    """Run or resume stage 1; returns the exit code (see `train.loop.fit`). Collective."""
    distributed = init_distributed()
    images = TrainingImages(config.data, config.seed, config.engine.accumulation_steps, distributed)
    run = RunDirectory(
        config.run,
        config,
        distributed,
        may_change=(
            "run",
            "loop",
            "engine",
            *HOW_IMAGES_ARE_READ,
            "init_from",
            "discriminator_from",
            "alignment.foundation.weights",
            "loss.perceptual.weights",
            "loss.perceptual.heads",
        ),
    )
    stage = VAEStage(config, images, distributed)
    return fit(stage, config.loop, run, config.data.global_batch, distributed)
