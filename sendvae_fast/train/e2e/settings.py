"""The settings of an end-to-end run."""

from __future__ import annotations

from dataclasses import dataclass, field

from sendvae_fast.engine.settings import OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.models.sit.sizes import check_repa_block
from sendvae_fast.sampling.settings import GenerateConfig
from sendvae_fast.train.settings import ImageDataConfig, LoopConfig
from sendvae_fast.train.sit.settings import FlowConfig, GeneratorConfig, RepaConfig
from sendvae_fast.train.vae.settings import AutoencoderTraining


@dataclass(kw_only=True)
class E2ERepaConfig(RepaConfig):
    """Representation alignment of generator and autoencoder. Raises `UserError` for a value out of range."""

    autoencoder_weight: float = 1.5
    """Weight of the alignment in the autoencoder's loss. REPA-E: 1.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.weight > 0 and self.autoencoder_weight > 0):
            raise UserError(
                f"repa.weight={self.weight:g} and repa.autoencoder_weight={self.autoencoder_weight:g} must be above 0: "
                "without alignment nothing of the generator reaches the autoencoder; use `train vae` and `train sit`"
            )


@dataclass(kw_only=True)
class E2ETrainConfig(AutoencoderTraining):
    """An end-to-end run (REPA-E). Raises `UserError` for settings that exclude each other."""

    data: ImageDataConfig = field(default_factory=lambda: ImageDataConfig(global_batch=256))
    """Training images. REPA-E: batch 256."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Sizes of the SiT."""
    generator_from: str | None = None
    """Generator to start from (its EMA), as `init_from` of `train sit`. Without it training starts from random
    weights, as REPA-E does."""
    start_from: str | None = None
    """Training checkpoint of REPA-E (its script's `.pt`, or what `sendvae convert --to=repa-e` writes) to go on from in
    place of weights of each network: all three, the averages and batch norm, the states of the three optimizers, and
    the step. Sizes and learning rates are those of this config."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Noise levels and losses of the velocity."""
    repa: E2ERepaConfig = field(default_factory=E2ERepaConfig)
    """Representation alignment. Its gradient reaches the autoencoder through the generator's first blocks."""
    generator_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, ema_decay=0.9999)
    )
    """AdamW and EMA of the generator. REPA-E: lr 1e-4, EMA 0.9999, clip 1.0."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(num_steps=400_320))
    """Length and reporting."""
    preview: GenerateConfig = field(default_factory=lambda: GenerateConfig(num_samples=16, batch_size=16))
    """How the preview grid is sampled from the generator's EMA weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init_from", "generator_from", "discriminator_from"):
            if self.start_from is not None and getattr(self, name) is not None:
                raise UserError(f"start_from has all networks, and {name} is given as well: leave one of them out")
        if self.generator_optimizer.ema_decay is None:
            raise UserError("generator_optimizer.ema_decay is null: samples are drawn from the average; give 0.9999")
        if self.loop.evaluate_every is not None:
            raise UserError(
                "loop.evaluate_every is for `train vae` and `train sit`: leave it out, evaluate checkpoints"
            )
        if not self.engine.has_whole_parameters:
            raise UserError(
                "engine.zero_stage=3 splits the generator's weights, through which the autoencoder learns: use "
                "zero_stage 0 to 2"
            )
        if self.engine.cuda_graph:
            raise UserError("engine.cuda_graph is for `train vae` and `train sit`: leave it out")
        if self.generator.label_dropout == 0 and self.preview.guidance_scale > 1:
            raise UserError(
                f"preview.guidance_scale is {self.preview.guidance_scale}, but generator.label_dropout=0 leaves no "
                "unconditional half to guide away from; set preview.guidance_scale=1"
            )
        if self.generator.is_diffusion:
            raise UserError("generator.diffusion: end-to-end training is REPA-E's, of a flow; take a SiT")
        check_repa_block(self.repa.block, self.generator.sizes()["depth"], "repa.block")
