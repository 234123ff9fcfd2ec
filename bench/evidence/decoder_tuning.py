"""Trains the decoder of a finished autoencoder further, its encoder fixed: the latents, and so the generator, stay.

If what alignment gains is lost in a decoder that a generator's errors hurt more, a decoder that has seen such errors
gives it back. L1 of pictures decoded from z + τ s ε: s the latents' standard deviation by channel, ε standard normal,
τ uniform up to `noise` for each picture. `noise` 0 is the control of equal steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import dtype_of
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.engine.snapshot import Snapshot, Write
from sendvae_fast.losses.reconstruction import reconstruction_loss
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.storage import WEIGHTS_FILE, convolutional, load_autoencoder, save_autoencoder
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.models.weights import read_weights
from sendvae_fast.ops import philox
from sendvae_fast.train.loop import fit
from sendvae_fast.train.settings import ImageDataConfig, LoopConfig
from sendvae_fast.train.training_images import TrainingImages


@dataclass(kw_only=True)
class DecoderTuningConfig:
    """A run that trains a decoder further."""

    run: str
    """Run directory. The same call again resumes it."""
    init_from: str
    """Autoencoder whose decoder it is."""
    data: ImageDataConfig
    """Training images."""
    noise: float
    """Largest τ."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW of the decoder."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The training engine."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length and reporting."""
    seed: int = 0
    """Of order and noise."""


class Decoding(nn.Module):
    """The part of an autoencoder that is trained: latents [B, C, H, W] to pictures."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z)


class DecoderStage:
    """Behind the loop's interface (`train.stage.Stage`)."""

    title = "decoder tuning"
    flops_by_part: dict[str, int] | None = None

    def __init__(self, config: DecoderTuningConfig, images: TrainingImages, distributed: Distributed) -> None:
        self.config, self.images, self.distributed = config, images, distributed
        self.dtype, self.learning_rate = dtype_of(config.engine), config.optimizer.learning_rate
        saved = load_autoencoder(resolve_weights(config.init_from))
        self.statistics = saved.latent_mean, saved.latent_std
        self.std = saved.latent_std.to(distributed.device)[:, None, None]
        self.autoencoder = convolutional(saved.autoencoder, config.init_from).requires_grad_(False)
        trained = [name for name, _ in self.autoencoder.named_parameters() if is_of_decoder(name)]
        for name in trained:
            self.autoencoder.get_parameter(name).requires_grad_(True)
        self.engine = build_engine(Decoding(self.autoencoder), config.optimizer, config.engine, distributed)

    def facts(self) -> dict[str, str]:
        """The pictures."""
        return self.images.facts()

    def next_command(self) -> str:
        """The tuned decoder's reconstructions."""
        return f"sendvae evaluate reconstruction --autoencoder={self.config.run}"

    def train_step(self, step: int, batch: ImageBatch) -> dict[str, Tensor | float]:
        """One step of the decoder."""
        device = self.distributed.device
        key = philox.make_key(self.config.seed, step, device)
        x, ids = to_model_range(batch.images.to(device)), batch.ids.to(device)
        with torch.no_grad():
            posterior = self.autoencoder.posterior(x)
            shape = posterior.mean.shape[1:]
            z = posterior.mean + posterior.std * philox.normal(key, philox.Stream.POSTERIOR, ids, shape)
            level = self.config.noise * philox.uniform(key, philox.Stream.TIME, ids, 1)[:, :, None, None]
            z = z + level * self.std * philox.normal(key, philox.Stream.INTERPOLANT, ids, shape)
        loss = reconstruction_loss(x, self.engine(z))
        self.engine.backward(loss)
        grad_norm = self.engine.queue_step()
        self.engine.see(grad_norm)
        return {"loss": loss.detach(), "grad_norm": grad_norm}

    def batches(self, start_step: int) -> Iterator[ImageBatch]:
        """Batches from `start_step` on."""
        return self.images.batches(start_step)

    def snapshot(self, snapshot: Snapshot) -> Write:
        """An autoencoder folder with the engine's state beside it."""
        state = self.engine.copy_full_state("model", snapshot)
        write_engine = self.engine.snapshot(snapshot)

        def write(directory: Path) -> None:
            write_engine(directory / "engine")
            if self.distributed.is_main:
                autoencoder = Autoencoder(self.autoencoder.config)
                autoencoder.load_state_dict({name.removeprefix("autoencoder."): value for name, value in state.items()})
                save_autoencoder(directory, autoencoder, *self.statistics)

        return write

    def load(self, directory: Path) -> None:
        """Read what was written of a `snapshot`."""
        weights = read_weights(directory / WEIGHTS_FILE)
        self.engine.load_model({f"autoencoder.{name}": value for name, value in weights.items()})
        self.engine.load(directory / "engine")

    def preview(self, step: int, directory: Path) -> None:
        """None: the decoders' pictures are measured."""


def is_of_decoder(name: str) -> bool:
    """Whether a weight of an autoencoder is its decoder's."""
    return name.startswith(("decoder.", "post_quant_conv."))


def tune_decoder(config: DecoderTuningConfig, distributed: Distributed) -> int:
    """Run or resume; returns the exit code of `train.loop.fit`."""
    images = TrainingImages(config.data, config.seed, 1, distributed)
    run = RunDirectory(config.run, config, distributed, may_change=("run", "init_from", "data.root"))
    stage = DecoderStage(config, images, distributed)
    return fit(stage, config.loop, run, config.data.global_batch, distributed)
