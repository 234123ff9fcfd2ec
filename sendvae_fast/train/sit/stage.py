"""Stage 2: train a SiT flow transformer with REPA on cached latents, or a DiT.

L = |v̂ - v|² + λ_direction (1 - cos(v̂, v)) + λ_repa (1 - cos(projected tokens, foundation features)). REPA trains it
without the second term, LightningDiT without the third. Shape letters: B batch, C latent channels, H W latent size,
N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from sendvae_fast.engine.build import build_engine, build_recorder, replayed_step
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.engine import Engine, dtype_of
from sendvae_fast.engine.flops import flops_are_read, flops_by_part
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.engine.snapshot import Snapshot, Write
from sendvae_fast.errors import UserError, needs_extra
from sendvae_fast.image_grid import save_grid
from sendvae_fast.models.autoencoder.storage import WEIGHTS_FILE, load_autoencoder
from sendvae_fast.models.diffusion import Diffusion
from sendvae_fast.models.latent_statistics import LatentStatistics, statistics_of_file
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.storage import EMA_FILE, load_initial_weights, save_sit
from sendvae_fast.models.weights import read_weights
from sendvae_fast.ops import noise_inject, philox
from sendvae_fast.ops.noise_inject import NoiseInjectOutput
from sendvae_fast.sampling.generate import LatentDecoder, check_sampler, generate
from sendvae_fast.train.accumulation import Means, micro_batches
from sendvae_fast.train.evaluation_settings import steps_between
from sendvae_fast.train.evaluator import Evaluator
from sendvae_fast.train.frozen_networks import build_foundation
from sendvae_fast.train.loop import fit
from sendvae_fast.train.memory_advice import PlannedMemory
from sendvae_fast.train.replay import replay
from sendvae_fast.train.run_words import count_words
from sendvae_fast.train.sit.arithmetic import step_flops
from sendvae_fast.train.sit.diffusion_losses import diffusion_losses
from sendvae_fast.train.sit.flow_losses import draw_noise_levels, flow_losses
from sendvae_fast.train.sit.latent_batches import LatentBatch, TrainingLatents
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.training_images import HOW_IMAGES_ARE_READ


class SiTStage:
    """Stage 2 behind the loop's interface (`train.stage.Stage`)."""

    title = "train sit"

    def __init__(self, config: SiTTrainConfig, latents: TrainingLatents, distributed: Distributed) -> None:
        self.config, self.latents, self.distributed = config, latents, distributed
        self.device = distributed.device
        with distributed.all_or_none():
            self.foundation = build_foundation(config.repa.weight, config.repa.foundation, config.engine, self.device)
        torch.manual_seed(config.seed)
        repa_dim = self.foundation.dim if self.foundation else None
        cache = latents.cache
        self.model = SiT(config.generator.build(cache.rows.shape, latents.num_classes, repa_dim, config.repa.block))
        self.diffusion = Diffusion.of(device=self.device) if self.model.config.diffusion else None
        if self.foundation is not None:
            self.foundation.check_grid(self.model.config.grid_shape[0])
        with distributed.all_or_none():
            if config.init_from is not None:
                load_initial_weights(self.model, resolve_weights(config.init_from))
        self.dtype, self.learning_rate = dtype_of(config.engine), config.optimizer.learning_rate
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.flops_by_part = flops_by_part(
            lambda: step_flops(self.model, self.foundation, config.data.image_size, self.device),
            *("sit", self.model.config, self.num_parameters, config.repa, config.data.image_size),
            are_read=flops_are_read(distributed, self.dtype),
        )
        recorder = build_recorder(config.engine, distributed)
        with nullcontext() if recorder is None else recorder.active():
            self.engine = build_engine(self.model, config.optimizer, config.engine, distributed)
        self._make_step = replayed_step(self._step, recorder, distributed)
        statistics = LatentStatistics(cache.latent_mean, cache.latent_std, config.latents)
        if config.latent_stats is not None:
            statistics = statistics_of_file(config.latent_stats).checked(cache.rows.shape[0])
        self.latent_mean, self.latent_std = statistics.mean.to(self.device), statistics.std.to(self.device)
        with distributed.all_or_none():
            self.decoder = self._open_decoder()

    def _open_decoder(self) -> LatentDecoder | None:
        """Open the decoder of previews, on every rank and now, so that an error ends the run before its first step."""
        if self.config.autoencoder is None:
            return None
        channels = self.model.config.latent_channels
        check_sampler(self.model.config, self.config.preview)
        autoencoder = load_autoencoder(resolve_weights(self.config.autoencoder)).autoencoder
        if autoencoder.config.latent_channels != channels:
            raise UserError(
                f"autoencoder {self.config.autoencoder} decodes latents of {autoencoder.config.latent_channels} "
                f"channels, but those of {self.config.latents} have {channels}: give the one that made them"
            )
        autoencoder.image_size(self.model.config.latent_shape)  # raises for a shape that it does not decode
        device = self.device if self.distributed.is_main else "cpu"
        return LatentDecoder(autoencoder.to(device), self.latent_mean, self.latent_std)

    def facts(self) -> dict[str, str]:
        """The latents, the pictures, the sizes, and what is aligned with what."""
        sizes, repa = self.model.config, self.config.repa
        rows, columns = sizes.grid_shape
        return {
            **self.latents.facts(),
            "parameters": f"{count_words(self.num_parameters)} in training",
            "tokens": f"{rows} x {columns} of width {sizes.width}, {sizes.depth} blocks",
            "alignment": "none" if self.foundation is None else f"block {repa.block}, {repa.foundation.name}",
        }

    def next_command(self) -> str:
        """Pictures from the generator."""
        command = f"sendvae sample --generator={self.config.run} --out={self.config.run}-samples"
        autoencoder = self.config.autoencoder or self.latents.autoencoder()
        if autoencoder is None:
            return f"{command}, with --autoencoder= and the folder or run that made the latents {self.config.latents}"
        return f"{command} --autoencoder={autoencoder}"

    def train_step(self, step: int, batch: LatentBatch) -> dict[str, Tensor | float]:
        """One optimizer step over the accumulated micro-batches."""
        key = philox.make_key(self.config.seed, step, self.device)
        values = self._make_step(key, *batch, uniform=self.config.flow.is_uniform(step))
        self.engine.see(values["grad_norm"])
        return values

    def _step(
        self,
        key: Tensor,
        ids: Tensor,
        mean: Tensor,
        std: Tensor,
        labels: Tensor,
        images: Tensor | None,
        *,
        uniform: bool,
    ) -> dict[str, Tensor | float]:
        """The device's part of a step: tensors in, tensors out, and no look at them, so that it can be replayed."""
        batch = LatentBatch(ids, mean, std, labels, images)
        means = Means(self.config.engine.accumulation_steps)
        for micro in micro_batches(batch, means.num, self.device):
            target = None if self.foundation is None else self.foundation(micro.images)
            losses = self._losses(key, micro, target, uniform=uniform)
            self.engine.backward(losses["loss"])
            means.add(losses)
        return {**means.values, "grad_norm": self.engine.queue_step()}

    def _losses(self, key: Tensor, batch: LatentBatch, target: Tensor | None, *, uniform: bool) -> dict[str, Tensor]:
        """The losses of a flow, or of a DiT."""
        labels, ids = batch.labels, batch.ids
        if self.diffusion is not None:
            normalised = self._noised(batch, key, torch.zeros(len(ids), device=self.device), None)
            return diffusion_losses(self.engine, self.config, self.diffusion, normalised, labels, key, ids, target)
        t = None if uniform else draw_noise_levels(key, ids)
        noised = self._noised(batch, key, t, self.model.config.patch_size)
        return flow_losses(self.engine, self.config, noised, labels, key, ids, target)

    def _noised(self, batch: LatentBatch, key: Tensor, t: Tensor | None, patch_size: int | None) -> NoiseInjectOutput:
        """Latents drawn of their posteriors, normalised, and noised to levels t."""
        return noise_inject(
            batch.mean.float(), batch.std.float(), self.latent_mean, self.latent_std, key, batch.ids, t,
            spread_is_std=True, patch_size=patch_size, need_z=False,
        )  # fmt: skip

    @property
    def engines(self) -> dict[str, Engine]:
        """That of the SiT."""
        return {"sit": self.engine}

    def batches(self, start_step: int) -> Iterator[LatentBatch]:
        """This rank's latents from `start_step` on, with the images of the same ids when REPA looks at them."""
        return self.latents.batches(start_step)

    def snapshot(self, snapshot: Snapshot) -> Write:
        """A SiT folder (see `models.sit.storage`) with the engine's state beside it."""
        weights = self.engine.copy_full_state("model", snapshot)
        ema = self.engine.copy_full_state("ema", snapshot) if "ema" in self.engine.state_keys else weights
        mean, std = (snapshot.copy("latent statistics", value) for value in (self.latent_mean, self.latent_std))
        write_engine = self.engine.snapshot(snapshot, beside=("ema",))

        def write(directory: Path) -> None:
            write_engine(directory / "engine" / "sit")
            if self.distributed.is_main:
                save_sit(directory, self.model.config, weights, ema, mean, std)

        return write

    def load(self, directory: Path) -> None:
        """Read what was written of a `snapshot`."""
        self.engine.load_model(read_weights(directory / WEIGHTS_FILE))
        self.engine.load(directory / "engine" / "sit", beside={"ema": read_weights(directory / EMA_FILE)})

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average of the weights, the weights where none is kept, on the CPU of every rank. Collective."""
        return self.engine.full_state("ema" if "ema" in self.engine.state_keys else "model")

    def preview(self, step: int, directory: Path) -> None:
        """A grid of samples from the EMA weights, as `samples_<step>.png`, decoded by the cache's autoencoder.

        Drawn on rank 0 by a second network, which lives in the memory that the step's activations have left.
        """
        if self.decoder is None:
            return
        averaged = self.averaged_weights()
        if not self.distributed.is_main:
            return
        sit = SiT(self.model.config)
        sit.load_state_dict(averaged)
        ids = torch.arange(self.config.preview.num_samples, device=self.device)
        batches = generate(sit.to(self.device), self.decoder, ids, self.config.preview)
        pictures = torch.cat([batch.images for batch in batches])
        save_grid(directory / f"samples_{step:08d}.png", pictures, columns=math.isqrt(len(pictures)))


def train_sit(config: SiTTrainConfig, planned: PlannedMemory | None = None) -> int:
    """Run or resume stage 2; returns the exit code (see `train.loop.fit`). Collective.

    planned: what a plan says of its memory, for the advice where a device has none left.
    """
    distributed = init_distributed(
        timeout_s=config.loop.start_timeout_s, cuda_graph=config.engine.cuda_graph, records=config.run
    )
    with distributed.all_or_none():
        latents = TrainingLatents(
            config.latents,
            config.data,
            config.reader,
            with_images=config.repa.weight > 0,
            seed=config.seed,
            accumulation_steps=config.engine.accumulation_steps,
            distributed=distributed,
        )
        evaluator = open_evaluator(config, latents, distributed)
    run = RunDirectory(
        config.run,
        config,
        distributed,
        may_change=(
            "run",
            "loop",
            "logging",
            "evaluation",
            "engine",
            *HOW_IMAGES_ARE_READ,
            "preview",
            "latents",
            "autoencoder",
            "reader",
            "init_from",
            "repa.foundation.weights",
            "replay",
            "dry_run",
        ),
        writes=config.replay is None,
        training_pictures=len(latents.cache),
    )
    stage = SiTStage(config, latents, distributed)
    if config.replay is not None:
        return replay(stage, run, config.replay, distributed)
    return fit(
        stage, config.loop, run, config.data.global_batch, distributed, config.logging, evaluator, planned=planned
    )


def open_evaluator(config: SiTTrainConfig, latents: TrainingLatents, distributed: Distributed) -> Evaluator | None:
    """What measures the run as it trains, None where nothing does. Raises UserError where something is missing."""
    every = steps_between(config.loop, config.evaluation)
    if every is None:
        return None
    with needs_extra("eval", "loop.evaluate_every"):  # packages that training does not need
        config.evaluation.features.check()
        from sendvae_fast.train.sit.evaluator import GenerationEvaluator

    return GenerationEvaluator(config, latents.cache.rows.shape, every, distributed)
