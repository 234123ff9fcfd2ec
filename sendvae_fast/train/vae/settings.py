"""The settings of a stage 1 run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.engine.settings import EngineConfig, LoggingConfig, OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.discriminator_config import DiscriminatorConfig
from sendvae_fast.train.evaluation_settings import ReconstructionWhileTraining
from sendvae_fast.train.settings import ImageDataConfig, LoopConfig
from sendvae_fast.train.vae.alignment_settings import AlignmentConfig


@dataclass(kw_only=True)
class VAELossConfig:
    """The weights of L_VAE. Defaults follow REPA-E's l1_lpips_kl_gan configuration.

    Raises `UserError` for a value out of range.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    """Pixel loss. The paper prints MSE, the configuration it builds on uses L1."""
    reconstruction_weight: float = 1.0
    """Weight of the pixel loss."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and its local weight files; without it there is no LPIPS term."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS."""
    reduction: Literal["mean", "sum"] = "mean"
    """Pixel loss and LPIPS as a mean over a picture's elements (REPA-E), or as latent-diffusion and VA-VAE have it for
    training from scratch: pixel loss plus LPIPS at every element (3 S S of them), summed. Their learnt log-variance is
    no part of it: it starts at 0 and no optimizer of theirs ever moves it."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence, summed over C, H, W and averaged over the batch."""
    gan_weight: float = 0.1
    """Weight of the generator's GAN loss; 0 trains without a discriminator."""
    gan_adaptive: bool = False
    """Scale the GAN weight by the ratio of last-layer gradients (VQGAN, VA-VAE) instead of keeping it fixed."""
    gan_start_step: int = 0
    """First step of the generator's GAN loss. Later than 0 suits a discriminator that was not pre-trained."""
    gan_warmup_steps: int = 0
    """Steps over which the GAN weight rises linearly, from `gan_weight` / `gan_warmup_steps` at `gan_start_step` on."""
    discriminator_start_step: int | None = None
    """First step at which the discriminator learns: null for `gan_start_step`, earlier to give it a head start."""

    def __post_init__(self) -> None:
        checks.choices(self, where="loss")
        checks.weights(self, "reconstruction_weight", "perceptual_weight", "kl_weight", "gan_weight", where="loss")
        checks.at_least(0, self, "gan_start_step", "gan_warmup_steps", where="loss")
        if not 0 <= self.discriminator_first_step <= self.gan_start_step:
            raise UserError(
                f"loss.discriminator_start_step={self.discriminator_start_step} must be between 0 and "
                f"loss.gan_start_step={self.gan_start_step}: nobody learns from a discriminator that does not"
            )

    @property
    def discriminator_first_step(self) -> int:
        """`discriminator_start_step`, with its null resolved."""
        return self.gan_start_step if self.discriminator_start_step is None else self.discriminator_start_step

    def gan_weight_at(self, step: int) -> float:
        """The scheduled weight of the generator's GAN loss, before any adaptive factor."""
        risen = step - self.gan_start_step + 1
        return self.gan_weight * min(max(risen, 0) / max(self.gan_warmup_steps, 1), 1.0)


@dataclass(kw_only=True)
class AutoencoderTraining:
    """What every run that trains an autoencoder is told, whatever else it trains.

    Raises `UserError` for settings that exclude each other.
    """

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
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    """Weights of the autoencoder's own losses."""
    cold_discriminator: bool = False
    """Allow fine-tuning with a discriminator that has learnt nothing when its full weight falls on the autoencoder.
    Otherwise that is an error, as it does more harm than no GAN loss."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Sizes of the PatchGAN discriminator."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))
    """AdamW of the autoencoder. REPA-E: lr 1e-4."""
    discriminator_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))
    """AdamW of the discriminator. REPA-E: lr 1e-4."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The training engine."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length and reporting."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """TensorBoard, Weights & Biases, trackio."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    replay: int | None = None
    """Make this step of the run again, print where its numbers stop being finite, and write nothing; null trains."""
    dry_run: bool = False
    """Open every file that the run needs, pretend its step on tensors without content, print the plan (`sendvae plan`),
    and train and write nothing."""

    def __post_init__(self) -> None:
        checks.weight_paths(self, "run")
        checks.seeds(self, "seed")
        checks.at_least(1, self, "replay", hint=", the number of a step, or null to train")
        loss = self.loss
        first_weight = loss.gan_weight_at(loss.discriminator_first_step)
        if (
            self.init_from is not None
            and self.discriminator_from is None
            and not self.cold_discriminator
            and 0 < loss.gan_weight <= first_weight
        ):
            raise UserError(
                f"discriminator_from is missing: fine-tuning {self.init_from} against a discriminator that has learnt "
                "nothing spoils it. Give the one it was trained with, or a head start (loss.discriminator_start_step "
                "before loss.gan_start_step) or loss.gan_warmup_steps, or loss.gan_weight=0, or cold_discriminator=true"
            )
        for name in ("optimizer", "discriminator_optimizer"):
            if getattr(self, name).ema_decay is not None:
                raise UserError(
                    f"{name}.ema_decay is for generators: autoencoders are exported as they are, as REPA-E does, and "
                    "an average of them would be kept for nothing: leave it out"
                )


@dataclass(kw_only=True)
class VAETrainConfig(AutoencoderTraining):
    """A stage 1 run. Raises `UserError` for settings that exclude each other."""

    evaluation: ReconstructionWhileTraining = field(default_factory=ReconstructionWhileTraining)
    """What is measured every `loop.evaluate_every` steps."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Alignment with a foundation model."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-4))
    """AdamW of autoencoder and mapper. The paper: lr 3e-4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment.is_adaptive and not self.engine.has_whole_parameters:
            raise UserError(
                "alignment.va.adaptive needs whole weights in the decoder, which engine.zero_stage=3 splits: use "
                "zero_stage 0 to 2, or --alignment.va.adaptive=false"
            )
