"""Stage 1: train an autoencoder whose noised latents align with a frozen foundation model.

L = λ_align L_align + L_VAE (Equation 3 of the paper), with L_VAE = reconstruction + LPIPS + GAN + KL as REPA-E weighs
them. Shape letters: B batch, S image size, C latent channels, H W latent size, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.build import build_engine, build_recorder, replayed_step
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.engine import Engine, dtype_of
from sendvae_fast.engine.flops import flops_are_read, flops_by_part
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.snapshot import Snapshot, Write
from sendvae_fast.errors import needs_extra
from sendvae_fast.files import save_tensors
from sendvae_fast.image_grid import save_grid
from sendvae_fast.losses.reconstruction import kl_loss
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.storage import WEIGHTS_FILE, save_autoencoder
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.models.send_vae import SendVAEOutput, join_state, split_state
from sendvae_fast.models.weights import read_weights
from sendvae_fast.ops import philox
from sendvae_fast.train.accumulation import Means, micro_batches
from sendvae_fast.train.evaluation_settings import steps_between
from sendvae_fast.train.evaluator import Evaluator
from sendvae_fast.train.frozen_networks import build_foundation, build_perceptual
from sendvae_fast.train.loop import fit
from sendvae_fast.train.memory_advice import PlannedMemory
from sendvae_fast.train.replay import replay
from sendvae_fast.train.run_words import count_words
from sendvae_fast.train.training_images import HOW_IMAGES_ARE_READ, TrainingImages
from sendvae_fast.train.vae.aligner import Aligner
from sendvae_fast.train.vae.arithmetic import step_flops
from sendvae_fast.train.vae.networks import build_discriminator_engine, build_model
from sendvae_fast.train.vae.picture_judge import PictureJudge
from sendvae_fast.train.vae.settings import VAETrainConfig

MAPPER_FILE = "mapper.safetensors"


class Pictures(NamedTuple):
    """What a step needs of a batch."""

    ids: Tensor  # int64 [B]
    images: Tensor  # uint8 [B, 3, S, S]


class VAEStage:
    """Stage 1 behind the loop's interface (`train.stage.Stage`)."""

    title = "train vae"
    NUM_PREVIEW_IMAGES = 8

    def __init__(self, config: VAETrainConfig, images: TrainingImages, distributed: Distributed) -> None:
        self.config, self.images, self.distributed = config, images, distributed
        self.device = distributed.device
        alignment, loss = config.alignment, config.loss
        with distributed.all_or_none():
            foundation = build_foundation(alignment.lambda_align, alignment.foundation, config.engine, self.device)
            torch.manual_seed(config.seed)
            self.model = build_model(config, foundation)
            perceptual = build_perceptual(loss.perceptual, config.engine, self.device)
        self.dtype, self.learning_rate = dtype_of(config.engine), config.optimizer.learning_rate
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        critic = config.discriminator if loss.gan_weight > 0 else None
        self.flops_by_part = flops_by_part(
            lambda: step_flops(self.model, foundation, perceptual, critic, config.data.image_size, self.device),
            *("vae", self.model.autoencoder.config, self.num_parameters, alignment, loss.perceptual, critic),
            config.data.image_size,
            are_read=flops_are_read(distributed, self.dtype),
        )
        recorder = build_recorder(config.engine, distributed)
        with nullcontext() if recorder is None else recorder.active():
            self.engine = build_engine(self.model, config.optimizer, config.engine, distributed)
            discriminator = build_discriminator_engine(config, distributed)
        self._make_step = replayed_step(self._step, recorder, distributed)
        last_layer = self.model.autoencoder.decoder.conv_out
        self.judge = PictureJudge(loss, perceptual, discriminator, last_layer, distributed)
        self.aligner = None if foundation is None else Aligner(alignment, foundation, self.model, distributed)

    def facts(self) -> dict[str, str]:
        """The pictures, the sizes, and what is aligned with what."""
        autoencoder, alignment = self.model.autoencoder.config, self.config.alignment
        grid = self.config.data.image_size // self.model.autoencoder.downsampling
        aligned = "none" if self.aligner is None else f"{alignment.method}, {alignment.foundation.name}"
        return {
            **self.images.facts(),
            "parameters": f"{count_words(self.num_parameters)} in training",
            "latents": f"{autoencoder.latent_channels} x {grid} x {grid} of {self.config.data.image_size} px",
            "alignment": aligned,
        }

    def next_command(self) -> str:
        """Stage 2 begins with the latents."""
        run = self.config.run
        return f"sendvae cache-latents --autoencoder={run} --data={self.config.data.root} --out={run}-latents"

    def train_step(self, step: int, batch: ImageBatch) -> dict[str, Tensor | float]:
        """One step of autoencoder and mapper, and one of the discriminator, over the accumulated micro-batches."""
        key = philox.make_key(self.config.seed, step, self.device)
        values, discriminator_norm = self._make_step(key, self.judge.gan_weight(step), batch.ids, batch.images)
        self.engine.see(values["grad_norm"])
        self.judge.see(discriminator_norm)
        return values

    def _step(
        self, key: Tensor, gan_weight: Tensor | None, ids: Tensor, images: Tensor
    ) -> tuple[dict[str, Tensor | float], Tensor | float | None]:
        """The device's part of a step: tensors in, tensors out, and no look at them, so that it can be replayed."""
        means = Means(self.config.engine.accumulation_steps)
        for micro in micro_batches(Pictures(ids, images), means.num, self.device):
            x = to_model_range(micro.images)
            output = self.engine(x, key, micro.ids)
            losses = self._loss(micro.images, x, output, gan_weight)
            self.engine.backward(losses["loss"])
            means.add(losses)
        grad_norm = self.engine.queue_step()
        return {**means.values, "grad_norm": grad_norm}, self.judge.queue_step(gan_weight)

    def _loss(self, images: Tensor, x: Tensor, output: SendVAEOutput, gan_weight: Tensor | None) -> dict[str, Tensor]:
        """L of a micro-batch under "loss", beside its terms and what else is logged of them.

        Args:
            images: uint8 [B, 3, S, S], for the foundation model.
            x: the same images in [-1, 1].
            output: the network's, for the same images.
            gan_weight: see `PictureJudge.gan_weight`.
        """
        pictures = self.judge(x, output.reconstruction, gan_weight)
        kl = kl_loss(output.moments)
        loss, logged = pictures.loss + self.config.loss.kl_weight * kl, {**pictures.logged, "kl": kl}
        if self.aligner is not None and output.features is not None:
            alignment, aligned = self.aligner(images, output.features, pictures.nll_gradient)
            loss, logged = loss + alignment, {**logged, **aligned}
        return {"loss": loss, **logged}

    @property
    def engines(self) -> dict[str, Engine]:
        """Those of the autoencoder with its mapper, and of the discriminator where there is one."""
        discriminator = self.judge.discriminator
        return {"vae": self.engine} | ({} if discriminator is None else {"discriminator": discriminator})

    def batches(self, start_step: int) -> Iterator[ImageBatch]:
        """This rank's batches from `start_step` on."""
        return self.images.batches(start_step)

    def snapshot(self, snapshot: Snapshot) -> Write:
        """An autoencoder folder with mapper, discriminator and engine state beside it."""
        state, rest = split_state(self.engine.copy_full_state("model", snapshot))
        mean, std = (snapshot.copy("latent_norm", value) for value in self.model.latent_norm.statistics())
        write_engine, write_judge = self.engine.snapshot(snapshot), self.judge.snapshot(snapshot)

        def write(directory: Path) -> None:
            write_engine(directory / "engine" / "vae")
            write_judge(directory)
            if self.distributed.is_main:
                autoencoder = _autoencoder_of(self.model.autoencoder.config, state)
                save_autoencoder(directory, autoencoder, mean, std)
                save_tensors(directory / MAPPER_FILE, rest)

        return write

    def trained_autoencoder(self) -> Autoencoder:
        """A copy of the autoencoder as it is now, on the CPU of every rank, in evaluation mode. Collective."""
        state, _ = split_state(self.engine.full_state("model"))
        return _autoencoder_of(self.model.autoencoder.config, state).eval()

    def load(self, directory: Path) -> None:
        """Read what was written of a `snapshot`."""
        self.engine.load_model(
            join_state(read_weights(directory / WEIGHTS_FILE), read_weights(directory / MAPPER_FILE))
        )
        self.engine.load(directory / "engine" / "vae")
        self.judge.load(directory)

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


def _autoencoder_of(config: AutoencoderConfig, state: dict[str, Tensor]) -> Autoencoder:
    """The autoencoder whose weights the tensors of `state` become: none are made, no random number is drawn."""
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    autoencoder.load_state_dict(state, assign=True)
    return autoencoder


def train_vae(config: VAETrainConfig, planned: PlannedMemory | None = None) -> int:
    """Run or resume stage 1; returns the exit code (see `train.loop.fit`). Collective.

    planned: what a plan says of its memory, for the advice where a device has none left.
    """
    distributed = init_distributed(
        timeout_s=config.loop.start_timeout_s, cuda_graph=config.engine.cuda_graph, records=config.run
    )
    with distributed.all_or_none():
        images = TrainingImages(config.data, config.seed, config.engine.accumulation_steps, distributed)
        evaluator = open_evaluator(config, images, distributed)
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
            "init_from",
            "discriminator_from",
            "alignment.foundation.weights",
            "loss.perceptual.weights",
            "loss.perceptual.heads",
            "replay",
            "dry_run",
        ),
        writes=config.replay is None,
        training_pictures=len(images.catalog),
    )
    stage = VAEStage(config, images, distributed)
    if config.replay is not None:
        return replay(stage, run, config.replay, distributed)
    return fit(
        stage, config.loop, run, config.data.global_batch, distributed, config.logging, evaluator, planned=planned
    )


def open_evaluator(config: VAETrainConfig, images: TrainingImages, distributed: Distributed) -> Evaluator | None:
    """What measures the run as it trains, None where nothing does. Raises UserError where something is missing."""
    every = steps_between(config.loop, config.evaluation)
    if every is None:
        return None
    with needs_extra("eval", "loop.evaluate_every"):  # packages that training does not need
        config.evaluation.features.check()
        from sendvae_fast.train.vae.evaluator import ReconstructionEvaluator

    return ReconstructionEvaluator(config, images.catalog, every, distributed)
