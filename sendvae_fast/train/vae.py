"""Stage 1: train an autoencoder whose noised latents align with a frozen foundation model.

L = λ_align L_align + L_VAE (Equation 3 of the paper), with L_VAE = reconstruction + LPIPS + GAN + KL as REPA-E weighs
them. Shape letters: B batch, S image size, C latent channels, H W latent size, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.engine import EngineConfig, build_engine
from sendvae_fast.engine.optimizer import OptimizerConfig
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.losses.adversarial import adaptive_weight, generator_loss, hinge_discriminator_loss
from sendvae_fast.losses.alignment import alignment_loss
from sendvae_fast.losses.perceptual import Perceptual, PerceptualConfig
from sendvae_fast.losses.reconstruction import kl_loss, reconstruction_loss
from sendvae_fast.models.autoencoder import Autoencoder, AutoencoderConfig
from sendvae_fast.models.autoencoder_io import WEIGHTS_FILE, load_autoencoder, save_autoencoder
from sendvae_fast.models.discriminator import Discriminator, DiscriminatorConfig, load_discriminator_weights
from sendvae_fast.models.foundation import Foundation, FoundationConfig
from sendvae_fast.models.mapper import Mapper, MapperConfig
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.models.send_vae import LatentNormKind, SendVAE, SendVAEOutput
from sendvae_fast.models.weights import read_weights
from sendvae_fast.ops import philox
from sendvae_fast.sampling.writer import save_grid, to_uint8
from sendvae_fast.train.common import (
    ImageDataConfig,
    TrainingImages,
    add_means,
    build_foundation,
    micro_batches,
    part_of,
    without,
)
from sendvae_fast.train.loop import LoopConfig, fit

MAPPER_FILE = "mapper.safetensors"
DISCRIMINATOR_FILE = "discriminator.safetensors"


@dataclass(kw_only=True)
class AlignmentConfig:
    """The alignment of Equations 1 and 2: which foundation model, through which mapper."""

    weight: float = 1.0
    """λ_align. The paper: 1.0. At 0 neither mapper nor foundation model is built."""
    foundation: FoundationConfig = field(default_factory=lambda: FoundationConfig(name="dinov2-vit-b"))
    """The frozen foundation model f."""
    noise: bool = True
    """Whether the mapper sees noised latents (Equation 1). The paper's Table 3 switches it off."""
    latent_norm: LatentNormKind = "running"
    """How latents are normalised before noising: running statistics, those loaded with the weights, or not at all."""
    width: int = 768
    """Mapper width. The paper: the foundation model's, 768 or 1024."""
    depth: int = 1
    """Transformer layers in the mapper. The paper's best: 1."""
    num_heads: int = 12
    """Attention heads in the mapper. The paper: 12 for width 768, 16 for 1024."""
    patch_size: int = 1
    """Latent positions per mapper token and side: 1 for f16 latents, 2 for f8."""
    projector_width: int = 2048
    """Hidden width of the mapper's MLP projector."""


@dataclass(kw_only=True)
class VAELossConfig:
    """The weights of L_VAE. Defaults follow REPA-E's l1_lpips_kl_gan configuration."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """Pixel loss. The paper prints MSE, the configuration it builds on uses L1."""
    reconstruction_weight: float = 1.0
    """Weight of the pixel loss, a mean over all elements."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and its local weight files; without it there is no LPIPS term."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence, summed over C, H, W and averaged over the batch."""
    gan_weight: float = 0.1
    """Weight of the generator's GAN loss; 0 trains without a discriminator."""
    gan_adaptive: bool = False
    """Scale the GAN weight by the ratio of last-layer gradients (VQGAN, VA-VAE) instead of keeping it fixed."""
    gan_start_step: int = 0
    """First step of the GAN loss. Later than 0 suits a discriminator that was not pre-trained."""


@dataclass(kw_only=True)
class VAETrainConfig:
    """A stage 1 run."""

    run: str
    """Run directory. The same command again resumes it."""
    data: ImageDataConfig
    """Training images."""
    init_from: str | None = None
    """Autoencoder to fine-tune: a folder of ours or of diffusers, an LDM checkpoint file with its latent statistics, or
    a run. Without it training starts from random weights."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Sizes of the autoencoder; with `init_from` they come from there, and other ones than the default must agree."""
    discriminator_from: str | None = None
    """Discriminator to start from: REPA-E's file, a training checkpoint of VA-VAE or REPA-E that has one, or a run."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Alignment with a foundation model."""
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    """Weights of the autoencoder's own losses."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Sizes of the PatchGAN discriminator."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-4))
    """AdamW of autoencoder and mapper. The paper: lr 3e-4."""
    discriminator_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))
    """AdamW of the discriminator. REPA-E: lr 1e-4."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What drives training."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length and reporting."""
    seed: int = 0
    """Seed of weights, data order and noise."""


class VAEStage:
    """Stage 1 behind the loop's interface (`train.loop.Stage`)."""

    title = "train vae"
    NUM_PREVIEW_IMAGES = 8

    def __init__(self, config: VAETrainConfig, images: TrainingImages, distributed: Distributed) -> None:
        self.config, self.images, self.distributed = config, images, distributed
        self.device = distributed.device
        self.foundation = build_foundation(config.alignment.weight, config.alignment.foundation, self.device)
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.foundation)
        self.perceptual = None
        if config.loss.perceptual is not None:
            self.perceptual = Perceptual(config.loss.perceptual).to(self.device)
        self.engine = build_engine(self.model, config.optimizer, config.engine)
        if config.loss.gan_adaptive:
            self.model.autoencoder.decoder.conv_out.register_forward_pre_hook(self._keep_last_input)
        self.discriminator_engine = None
        if config.loss.gan_weight > 0:
            discriminator = build_discriminator(config)
            self.discriminator_engine = build_engine(discriminator, config.discriminator_optimizer, config.engine)

    # -- one step, read aloud ------------------------------------------------------------------------------------

    def train_step(self, step: int, batch: ImageBatch) -> dict[str, Tensor | float]:
        """One step of autoencoder and mapper and one of the discriminator, over the accumulated micro-batches."""
        key = philox.make_key(self.config.seed, step, self.device)
        use_gan = self.discriminator_engine is not None and step >= self.config.loss.gan_start_step
        logged: dict[str, Tensor | float] = {}
        for micro in micro_batches(batch, self.config.engine.accumulation_steps, self.device):
            x = to_model_range(micro.images)
            target = None if self.foundation is None else self.foundation(micro.images)
            output = self.engine(x, key, micro.ids)
            losses = self._autoencoder_backward(x, output, target, use_gan)
            if use_gan:
                losses["discriminator"] = self._discriminator_backward(x, output.reconstruction.detach())
            add_means(logged, losses, self.config.engine.accumulation_steps)
        logged["grad_norm"] = self.engine.step().grad_norm
        if use_gan:
            self.discriminator_engine.step()
        return logged

    def _autoencoder_backward(
        self, x: Tensor, output: SendVAEOutput, target: Tensor | None, use_gan: bool
    ) -> dict[str, Tensor]:
        """Backward of L for autoencoder and mapper; returns its parts."""
        # An alias: the adaptive weight differentiates with respect to it, and stops there.
        weights, x_hat = self.config.loss, output.reconstruction.float().view_as(output.reconstruction)
        parts = {"reconstruction": reconstruction_loss(x, x_hat, weights.reconstruction)}
        loss = weights.reconstruction_weight * parts["reconstruction"]
        if self.perceptual is not None:
            parts["lpips"] = self.perceptual(x, x_hat).mean()
            loss = loss + weights.perceptual_weight * parts["lpips"]
        parts["kl"] = kl_loss(output.moments)
        if target is not None:
            parts["align"] = alignment_loss(output.features, target)
        # The discriminator is a fixed function here: gradients pass through it and leave none in it.
        with self.discriminator_engine.frozen() if use_gan else nullcontext() as discriminator:
            if use_gan:
                parts["gan"] = generator_loss(discriminator(x_hat))
                gan_weight = weights.gan_weight
                if weights.gan_adaptive:
                    gan_weight = gan_weight * adaptive_weight(loss, parts["gan"], x_hat, self._last_input)
                loss = loss + gan_weight * parts["gan"]
            loss = loss + weights.kl_weight * parts["kl"]
            if target is not None:
                loss = loss + self.config.alignment.weight * parts["align"]
            self.engine.backward(loss)
        return {"loss": loss, **parts}

    def _keep_last_input(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        """Keeps what enters the decoder's last layer, for the adaptive weight."""
        (self._last_input,) = arguments

    def _discriminator_backward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Backward of the hinge loss for the discriminator; real and fake pass it apart, as in VQGAN."""
        loss = hinge_discriminator_loss(self.discriminator_engine(x), self.discriminator_engine(x_hat))
        self.discriminator_engine.backward(loss)
        return loss

    # -- the rest of the loop's interface ------------------------------------------------------------------------

    def batches(self, start_step: int) -> Iterator[ImageBatch]:
        """This rank's batches from `start_step` on."""
        return self.images.batches(start_step)

    def save(self, directory: Path) -> None:
        """An autoencoder folder (see `models.autoencoder_io`) with mapper, discriminator and engine state beside it."""
        state = self.engine.full_state("model")
        self.engine.save(directory / "engine" / "vae")
        discriminator_state = None
        if self.discriminator_engine is not None:
            discriminator_state = self.discriminator_engine.full_state("model")
            self.discriminator_engine.save(directory / "engine" / "discriminator")
        if not self.distributed.is_main:
            return
        autoencoder = Autoencoder(self.model.autoencoder.config)
        autoencoder.load_state_dict(part_of(state, "autoencoder"))
        save_autoencoder(directory, autoencoder, *self.model.latent_norm.statistics())
        save_file(without(state, "autoencoder"), directory / MAPPER_FILE)
        if discriminator_state is not None:
            save_file(discriminator_state, directory / DISCRIMINATOR_FILE)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        autoencoder = {f"autoencoder.{name}": value for name, value in read_weights(directory / WEIGHTS_FILE).items()}
        self.engine.load_model({**autoencoder, **read_weights(directory / MAPPER_FILE)})
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


def build_model(config: VAETrainConfig, foundation: Foundation | None) -> SendVAE:
    """Autoencoder (from `init_from` or fresh) and, with a foundation model, the mapper to its features.

    Raises UserError for sizes that do not fit together.
    """
    alignment = config.alignment
    initial = None if config.init_from is None else load_autoencoder(resolve_weights(config.init_from))
    autoencoder = Autoencoder(config.autoencoder) if initial is None else initial.autoencoder
    differences = autoencoder.config.differences(config.autoencoder)
    if differences and config.autoencoder != AutoencoderConfig():
        raise UserError(
            f"init_from={config.init_from} is not what `autoencoder` describes: {'; '.join(differences)}. Leave its "
            "settings out, or give weights of these sizes"
        )
    mapper = None
    if foundation is not None:
        latent_size, remainder = divmod(config.data.image_size, autoencoder.downsampling)
        grid_size, grid_remainder = divmod(latent_size, alignment.patch_size)
        if remainder or grid_remainder:
            raise UserError(
                f"data.image_size={config.data.image_size} must be a multiple of the autoencoder's downsampling "
                f"{autoencoder.downsampling} times alignment.patch_size={alignment.patch_size}"
            )
        foundation.check_grid(grid_size)
        mapper = Mapper(MapperConfig(
            latent_channels=autoencoder.config.latent_channels, grid_size=grid_size, target_dim=foundation.dim,
            width=alignment.width, depth=alignment.depth, num_heads=alignment.num_heads,
            patch_size=alignment.patch_size, projector_width=alignment.projector_width,
        ))
    model = SendVAE(autoencoder, mapper, alignment.latent_norm, alignment.noise)
    if initial is not None:
        model.latent_norm.set_statistics(initial.latent_mean, initial.latent_std)
    elif alignment.latent_norm == "fixed":
        raise UserError("alignment.latent_norm=fixed needs init_from, whose latent statistics it keeps; use running")
    return model


def build_discriminator(config: VAETrainConfig) -> Discriminator:
    """The discriminator, from `discriminator_from` or fresh; UserError where the weights do not fit."""
    discriminator = Discriminator(config.discriminator)
    if config.discriminator_from is not None:
        weights = resolve_weights(config.discriminator_from)
        load_discriminator_weights(discriminator, weights / DISCRIMINATOR_FILE if weights.is_dir() else weights)
    return discriminator


def train_vae(config: VAETrainConfig) -> int:
    """Run or resume stage 1; returns the exit code (see `train.loop.fit`). Collective."""
    distributed = init_distributed()
    images = TrainingImages(config.data, config.seed, config.engine.accumulation_steps, distributed)
    run = RunDirectory(config.run, config, may_change=(
        "run", "loop", "engine", "data.root", "init_from", "discriminator_from",
    ))
    stage = VAEStage(config, images, distributed)
    return fit(stage, config.loop, run, config.data.global_batch, distributed)
