"""The settings of a stage 2 run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sendvae_fast import checks
from sendvae_fast.engine.engine import EngineConfig
from sendvae_fast.engine.optimizer import OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.config import FoundationConfig
from sendvae_fast.models.sit.sizes import SiTConfig, preset_sizes
from sendvae_fast.sampling.generate import GenerateConfig
from sendvae_fast.train.loop import LoopConfig
from sendvae_fast.train.sit.latent_batches import LatentReaderConfig
from sendvae_fast.train.training_images import ImageDataConfig

_OWN_SIZES = ("patch_size", "width", "depth", "num_heads", "swiglu", "rms_norm", "rope", "qk_norm")


@dataclass(kw_only=True)
class GeneratorConfig:
    """Sizes of the SiT; what the latents and the data decide is taken from the cache."""

    preset: str | None = "SiT-XL/1"
    """A published network, SiT-{S,B,L,XL}/{1,2,4,8} or LightningDiT-{B,L,XL,1p0B,1p6B}/{1,2}; null for one of your own.
    What is given below goes before the preset's."""
    patch_size: int | None = None
    """Latent positions per token and side. null: the preset's, 1 without one."""
    width: int | None = None
    """Width of the transformer. null: the preset's."""
    depth: int | None = None
    """Transformer blocks. null: the preset's."""
    num_heads: int | None = None
    """Attention heads. null: the preset's."""
    swiglu: bool | None = None
    """SwiGLU instead of the GELU MLP. null: the preset's, off without one."""
    rms_norm: bool | None = None
    """RMSNorm instead of LayerNorm. null: the preset's, off without one."""
    rope: bool | None = None
    """Rotary positions on queries and keys. null: the preset's, off without one."""
    qk_norm: bool | None = None
    """Normalised queries and keys, against NaN in long runs. null: off."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    projector_width: int = 2048
    """Hidden width of the REPA projector."""

    def build(
        self, latent_shape: tuple[int, int, int] | None, num_classes: int, repa_dim: int | None, repa_block: int
    ) -> SiTConfig:
        """The full SiT config for latents [C, H, W]; None: for the smallest that fit, to see whether the rest does."""
        sizes: dict[str, Any] = {"patch_size": 1} if self.preset is None else preset_sizes(self.preset)
        sizes.update({name: getattr(self, name) for name in _OWN_SIZES if getattr(self, name) is not None})
        missing = [name for name in ("width", "depth", "num_heads") if name not in sizes]
        if missing:
            raise UserError(f"generator.preset is null and generator.{missing[0]} is missing: give either")
        channels, size = latent_shape[:2] if latent_shape else (1, max(1, sizes["patch_size"]))
        return SiTConfig(
            **sizes,
            latent_channels=channels,
            latent_size=size,
            num_classes=num_classes,
            repa_dim=repa_dim,
            repa_block=repa_block,
            label_dropout=self.label_dropout,
            projector_width=self.projector_width,
        )


@dataclass(kw_only=True)
class RepaConfig:
    """Representation alignment of the generator (REPA). Raises `UserError` for a value out of range."""

    weight: float = 0.5
    """λ_repa. REPA: 0.5. At 0 neither projector nor foundation model is built."""
    foundation: FoundationConfig = field(default_factory=lambda: FoundationConfig(name="dinov2-vit-b"))
    """The frozen foundation model."""
    block: int = 8
    """The projector reads the tokens after this block. REPA: 8."""

    def __post_init__(self) -> None:
        checks.weights(self, "weight", where="repa", hint=" (0 trains without REPA)")


@dataclass(kw_only=True)
class FlowConfig:
    """Noise levels and losses of the velocity. The defaults are SiT's and REPA's.

    Raises `UserError` for a value out of range.
    """

    noise_level: Literal["uniform", "logit_normal"] = "uniform"
    """How noise levels are drawn. logit_normal: the sigmoid of a standard normal number (LightningDiT)."""
    logit_normal_steps: int | None = None
    """Steps with logit_normal, after which noise levels are uniform (LightningDiT's 800 epochs: 600,000); null: all."""
    direction_weight: float = 0.0
    """Weight of 1 - cos(predicted velocity, velocity) over channels. LightningDiT: 1."""

    def __post_init__(self) -> None:
        checks.choices(self, where="flow")
        checks.at_least(1, self, "logit_normal_steps", where="flow", hint=", or null for all steps")
        checks.weights(self, "direction_weight", where="flow")
        if self.logit_normal_steps is not None and self.noise_level == "uniform":
            raise UserError("flow.logit_normal_steps is for flow.noise_level=logit_normal: set that, or leave it out")

    def is_uniform(self, step: int) -> bool:
        """Whether the noise levels of a step are uniform."""
        return self.noise_level == "uniform" or step >= (self.logit_normal_steps or math.inf)


@dataclass(kw_only=True)
class SiTTrainConfig:
    """A stage 2 run. Raises `UserError` for settings that exclude each other."""

    run: str
    """Run directory. The same command again resumes it."""
    latents: str
    """Latent cache folder, as `sendvae cache-latents` writes it, or a folder of LightningDiT's published latents."""
    latent_stats: str | None = None
    """File with the mean and standard deviation that latents are normalised by: ours, REPA-E's `-latents-stats.pt` or a
    checkpoint of its generator (its frozen batch norm), LightningDiT's `latents_stats.pt`. null: those of the cache."""
    autoencoder: str | None = None
    """Autoencoder folder or run that decodes the preview pictures; without it there are none."""
    data: ImageDataConfig = field(default_factory=lambda: ImageDataConfig(global_batch=256))
    """The global batch, and the photographs the cache was made from when REPA looks at them beside the latents."""
    reader: LatentReaderConfig = field(default_factory=LatentReaderConfig)
    """How latents are read."""
    init_from: str | None = None
    """Generator to start from (its EMA): a SiT folder or run, or a checkpoint of SiT, REPA, REPA-E or LightningDiT. Its
    sizes must be those of this run. Without it training starts from random weights."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Sizes of the SiT."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Noise levels and losses of the velocity."""
    repa: RepaConfig = field(default_factory=RepaConfig)
    """Representation alignment."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4, ema_decay=0.9999))
    """AdamW and EMA. REPA: lr 1e-4, EMA 0.9999, clip 1.0."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What drives training."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(num_steps=400_320))
    """Length and reporting."""
    preview: GenerateConfig = field(default_factory=lambda: GenerateConfig(num_samples=16, batch_size=16))
    """How the preview grid is sampled from the EMA weights."""
    seed: int = 0
    """Seed of weights, data order, noise and label dropout."""

    def __post_init__(self) -> None:
        if self.generator.label_dropout == 0 and self.preview.guidance_scale > 1:
            raise UserError(
                f"preview.guidance_scale is {self.preview.guidance_scale}, but generator.label_dropout=0 leaves no "
                "unconditional half to guide away from; set preview.guidance_scale=1"
            )
        # What the latents will decide apart, sizes are checked here, before any data is opened.
        self.generator.build(None, 1, repa_dim=1 if self.repa.weight > 0 else None, repa_block=self.repa.block)
