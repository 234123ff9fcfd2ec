"""The settings of a stage 1 run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sendvae_fast.engine.engine import EngineConfig
from sendvae_fast.engine.optimizer import OptimizerConfig
from sendvae_fast.losses.perceptual import PerceptualConfig
from sendvae_fast.models.autoencoder import AutoencoderConfig
from sendvae_fast.models.discriminator import DiscriminatorConfig
from sendvae_fast.models.foundation import FoundationConfig
from sendvae_fast.models.send_vae import LatentNormKind
from sendvae_fast.train.common import ImageDataConfig
from sendvae_fast.train.loop import LoopConfig


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
