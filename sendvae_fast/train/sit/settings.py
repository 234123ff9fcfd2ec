"""The settings of a stage 2 run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from sendvae_fast import checks
from sendvae_fast.engine.settings import EngineConfig, LoggingConfig, OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.sit.sizes import SiTConfig, SiTSizes, check_repa_block, fields_of_latents, preset_sizes
from sendvae_fast.sampling.settings import GenerateConfig
from sendvae_fast.train.evaluation_settings import GenerationWhileTraining
from sendvae_fast.train.settings import ImageDataConfig, LoopConfig


@dataclass(kw_only=True)
class GeneratorConfig(SiTSizes):
    """Sizes of the SiT; what the latents and the data decide is taken from the cache."""

    section: ClassVar[str] = "generator"

    preset: str | None = "SiT-XL/1"
    """A published network, SiT-{S,B,L,XL}/{1,2,4,8}, LightningDiT-{B,L,XL,1p0B,1p6B}/{1,2} or DiT-{S,B,L,XL}/{2,4,8};
    null for one of your own. Sizes that are given go before the preset's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.sizes()
        if self.preset is not None:
            replace(self, preset=None, **sizes)  # raises where what is given does not fit what the preset adds

    def sizes(self) -> dict[str, Any]:
        """The sizes that are given and the preset's for the others, as `SiTConfig` takes them.

        Raises UserError where neither gives one.
        """
        sizes: dict[str, Any] = {"patch_size": 1} if self.preset is None else preset_sizes(self.preset)
        given = {item.name: getattr(self, item.name) for item in fields(SiTSizes)}
        sizes.update({name: value for name, value in given.items() if value is not None})
        for name in ("width", "depth", "num_heads"):
            if name not in sizes:
                raise UserError(f"generator.preset is null and generator.{name} is missing: give either")
        return sizes

    @property
    def is_diffusion(self) -> bool:
        """Whether the generator is a DiT."""
        return bool(self.sizes().get("diffusion"))

    def build(
        self, latent_shape: tuple[int, int, int], num_classes: int, repa_dim: int | None, repa_block: int
    ) -> SiTConfig:
        """The full config of a SiT for latents [C, H, W].

        Raises UserError where they are neither square nor one row, or the network does not fit them.
        """
        return SiTConfig(
            **self.sizes(),
            **fields_of_latents(latent_shape),
            num_classes=num_classes,
            repa_dim=repa_dim,
            repa_block=repa_block,
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
class LatentReaderConfig:
    """How latents are read; none of it changes what comes out. Raises `UserError` for a value out of range."""

    num_threads: int = 4
    """Threads that read shards in the background."""
    read_ahead: int = 8
    """Batches read beyond the one in use."""
    verify_hashes: bool = False
    """Compare every shard of a cache with its sha256 before training; reads all of it once."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "num_threads", where="reader")
        checks.at_least(0, self, "read_ahead", where="reader")


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
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """TensorBoard, Weights & Biases, trackio."""
    preview: GenerateConfig = field(default_factory=lambda: GenerateConfig(num_samples=16, batch_size=16))
    """How the preview grid is sampled from the EMA weights."""
    evaluation: GenerationWhileTraining = field(default_factory=GenerationWhileTraining)
    """What is measured every `loop.evaluate_every` steps."""
    seed: int = 0
    """Seed of weights, data order, noise and label dropout."""
    replay: int | None = None
    """Make this step of the run again, print where its numbers stop being finite, and write nothing; null trains."""
    dry_run: bool = False
    """Open every file that the run needs, pretend its step on tensors without content, print the plan (`sendvae plan`),
    and train and write nothing."""

    def __post_init__(self) -> None:
        checks.weight_paths(self, "run")
        checks.seeds(self, "seed")
        checks.at_least(1, self, "replay", hint=", the number of a step, or null to train")
        for name, drawn in (("preview", self.preview), ("evaluation.generate", self.evaluation.generate)):
            if self.generator.label_dropout == 0 and drawn.guidance_scale > 1:
                raise UserError(
                    f"{name}.guidance_scale is {drawn.guidance_scale}, but generator.label_dropout=0 leaves no "
                    f"unconditional half to guide away from; set {name}.guidance_scale=1"
                )
        if self.generator.is_diffusion and self.flow != FlowConfig():
            raise UserError("flow.* is for flows: a DiT (generator.diffusion) draws its steps evenly; leave it out")
        if self.repa.weight > 0:
            check_repa_block(self.repa.block, self.generator.sizes()["depth"], "repa.block")
