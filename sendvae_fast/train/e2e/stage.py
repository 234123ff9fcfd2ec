"""REPA-E (Leng et al., arXiv:2504.10483): train an autoencoder and the SiT on its latents together.

    autoencoder    L_VAE + 1.5 (1 - cos(projected tokens, foundation features)), through the SiT's first blocks
    generator      |v̂ - v|² + 0.5 (1 - cos(projected tokens, foundation features)), on the same latents, cut off

Each has its own optimizer and clipping, as has the discriminator. Latent, noise and noise level of both passes are the
same: they are drawn by step and sample id. The generator's loss does not reach the autoencoder, the autoencoder's moves
no weight of the generator. Shape letters: B batch, C latent channels, H W latent size, N tokens, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.engine import Engine, dtype_of
from sendvae_fast.engine.flops import flops_are_read, flops_by_part
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.snapshot import Snapshot, Write
from sendvae_fast.files import AUTOENCODER_PART, GENERATOR_PART, save_tensors
from sendvae_fast.image_grid import save_grid
from sendvae_fast.losses.alignment import alignment_loss
from sendvae_fast.losses.known_gradient import with_known_gradient
from sendvae_fast.losses.reconstruction import kl_loss
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.storage import WEIGHTS_FILE, save_autoencoder
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.storage import EMA_FILE, save_sit
from sendvae_fast.models.weights import read_weights
from sendvae_fast.ops import philox
from sendvae_fast.sampling.generate import LatentDecoder, generate
from sendvae_fast.train.accumulation import Means, micro_batches
from sendvae_fast.train.e2e.arithmetic import step_flops
from sendvae_fast.train.e2e.networks import LATENT_NORM_FILE, NoisedReconstruction, build_networks, noise_latents
from sendvae_fast.train.e2e.repa_e_checkpoint import begin_from
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.frozen_networks import build_foundation, build_perceptual
from sendvae_fast.train.loop import fit
from sendvae_fast.train.memory_advice import PlannedMemory
from sendvae_fast.train.replay import replay
from sendvae_fast.train.run_words import count_words
from sendvae_fast.train.sit.flow_losses import draw_noise_levels, flow_losses
from sendvae_fast.train.training_images import HOW_IMAGES_ARE_READ, TrainingImages
from sendvae_fast.train.vae.networks import build_discriminator_engine
from sendvae_fast.train.vae.picture_judge import PictureJudge

_AUTOENCODER, _NORM = "autoencoder.", "bn."


class Encoded(NamedTuple):
    """What the generator's pass needs of a micro-batch that has gone through the autoencoder."""

    ids: Tensor  # int64 [B]
    labels: Tensor  # int64 [B]
    moments: Tensor  # [B, 2C, H, W]
    z: Tensor  # [B, C, H, W]
    t: Tensor  # float32 [B]
    target: Tensor  # [B, N, D]


class E2EStage:
    """An end-to-end run behind the loop's interface (`train.stage.Stage`)."""

    title = "train e2e"
    NUM_PREVIEW_IMAGES = 8

    def __init__(self, config: E2ETrainConfig, images: TrainingImages, distributed: Distributed) -> None:
        self.config, self.images, self.distributed = config, images, distributed
        self.device = distributed.device
        self.dtype, self.learning_rate = dtype_of(config.engine), config.optimizer.learning_rate
        with distributed.all_or_none():
            foundation = build_foundation(config.repa.weight, config.repa.foundation, config.engine, self.device)
            assert foundation is not None  # the settings refuse a weight of 0
            self.foundation = foundation
            torch.manual_seed(config.seed)
            self.model, self.sit = build_networks(config, foundation, len(images.catalog.class_names))
            config.preview.check_channels(self.sit.config.latent_channels)
            perceptual = build_perceptual(config.loss.perceptual, config.engine, self.device)
        networks = (self.model, self.sit)
        self.num_parameters = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
        critic = config.discriminator if config.loss.gan_weight > 0 else None
        self.flops_by_part = flops_by_part(
            lambda: step_flops(
                self.model.autoencoder, self.sit, foundation, perceptual, critic, config.data.image_size, self.device
            ),
            *("e2e", self.model.autoencoder.config, self.sit.config, self.num_parameters, config.repa),
            *(config.loss.perceptual, critic, config.data.image_size),
            are_read=flops_are_read(distributed, self.dtype),
        )
        self.engine = build_engine(self.model, config.optimizer, config.engine, distributed)
        self.generator = build_engine(self.sit, config.generator_optimizer, config.engine, distributed)
        discriminator = build_discriminator_engine(config, distributed)
        last_layer = self.model.autoencoder.decoder.conv_out
        self.judge = PictureJudge(config.loss, perceptual, discriminator, last_layer, distributed)

    def facts(self) -> dict[str, str]:
        """The pictures, the sizes, and what is aligned with what."""
        sizes, repa = self.sit.config, self.config.repa
        autoencoder, generator = map(count_words, self.num_parameters)
        rows, columns = sizes.grid_shape
        return {
            **self.images.facts(),
            "parameters": f"{autoencoder} of the autoencoder and {generator} of the generator in training",
            "latents": " x ".join(map(str, sizes.latent_shape)),
            "tokens": f"{rows} x {columns} of width {sizes.width}, {sizes.depth} blocks",
            "alignment": f"block {repa.block}, {repa.foundation.name}",
        }

    def next_command(self) -> str:
        """Pictures from both networks."""
        run = self.config.run
        return f"sendvae sample --generator={run} --autoencoder={run} --out={run}-samples"

    def train_step(self, step: int, batch: ImageBatch) -> dict[str, Tensor | float]:
        """One step of the autoencoder, of the discriminator, then of the generator on the latents from before."""
        key = philox.make_key(self.config.seed, step, self.device)
        means, gan_weight = Means(self.config.engine.accumulation_steps), self.judge.gan_weight(step)
        encoded = [
            self._train_autoencoder(step, micro, key, gan_weight, means)
            for micro in micro_batches(batch, means.num, self.device)
        ]
        grad_norm = self.engine.queue_step()
        self.engine.see(grad_norm)
        self.judge.see(self.judge.queue_step(gan_weight))
        statistics = self.sit.bn.follow([part.z for part in encoded], self.distributed)
        for part in encoded:
            self._train_generator(part, statistics, key, means)
        generator_grad_norm = self._update_generator()
        both = torch.hypot(torch.as_tensor(grad_norm), torch.as_tensor(generator_grad_norm))
        return {**means.values, "grad_norm": both, "generator_grad_norm": generator_grad_norm}

    def _train_autoencoder(
        self, step: int, batch: ImageBatch, key: Tensor, gan_weight: Tensor | None, means: Means
    ) -> Encoded:
        """The autoencoder's backward pass; what the generator's needs afterwards."""
        x, target = to_model_range(batch.images), self.foundation(batch.images)
        t = None if self.config.flow.is_uniform(step) else draw_noise_levels(key, batch.ids)
        output = self.engine(x, self.sit.bn.statistics(), key, batch.ids, t)
        pictures = self.judge(x, output.reconstruction, gan_weight)
        kl, align = kl_loss(output.moments), self._alignment(output, batch.labels, target)
        loss = pictures.loss + self.config.loss.kl_weight * kl + self.config.repa.autoencoder_weight * align
        self.engine.backward(loss)
        means.add({"loss": loss, **pictures.logged, "kl": kl, "autoencoder_align": align})
        return Encoded(batch.ids, batch.labels, output.moments.detach(), output.z.detach(), output.t, target)

    def _alignment(self, output: NoisedReconstruction, labels: Tensor, target: Tensor) -> Tensor:
        """The alignment of the generator's tokens as a loss of the autoencoder: its graph begins at the noised latent.

        No label is dropped and no weight of the generator gets a gradient.
        """

        def loss(features: Tensor) -> Tensor:
            return alignment_loss(features, target)

        features, gradient = self.generator.input_gradient(
            output.z_t, loss, lambda z_t: self.sit.project(z_t, output.t, labels)
        )
        return with_known_gradient(loss(features.detach()), output.z_t, gradient)

    def _train_generator(self, part: Encoded, statistics: tuple[Tensor, Tensor], key: Tensor, means: Means) -> None:
        """The generator's backward pass, on latents normalised by their own batch."""
        noised = noise_latents(
            part.moments.float(), statistics, key, part.ids, part.t, self.sit.config.patch_size, need_z=False
        )
        losses = flow_losses(self.generator, self.config, noised, part.labels, key, part.ids, part.target)
        self.generator.backward(losses.pop("loss"))
        means.add(losses)

    def _update_generator(self) -> Tensor | float:
        """The generator's step and the averages that go with it; the norm of its gradients."""
        grad_norm = self.generator.queue_step()
        self.generator.see(grad_norm)
        decay = self.config.generator_optimizer.ema_decay
        assert decay is not None  # the settings refuse it
        self.sit.bn.average(decay, torch.as_tensor(grad_norm).isfinite())
        return grad_norm

    @property
    def engines(self) -> dict[str, Engine]:
        """Those of autoencoder, generator, and the discriminator where there is one."""
        discriminator = self.judge.discriminator
        engines = {"vae": self.engine, "sit": self.generator}
        return engines | ({} if discriminator is None else {"discriminator": discriminator})

    def batches(self, start_step: int) -> Iterator[ImageBatch]:
        """This rank's batches from `start_step` on."""
        return self.images.batches(start_step)

    def snapshot(self, snapshot: Snapshot) -> Write:
        """A folder of the autoencoder, one of the generator, and the engines' states. Collective.

        Both have the averaged latent statistics: REPA-E exports these with the autoencoder's weights as they are.
        """
        state = {
            key.removeprefix(_AUTOENCODER): value
            for key, value in self.engine.copy_full_state("model", snapshot).items()
        }
        weights, ema = (self.generator.copy_full_state(kind, snapshot) for kind in ("model", "ema"))
        mean, std = (snapshot.copy("latent statistics", value) for value in self.sit.bn.averaged())
        write_engine, write_generator = (
            self.engine.snapshot(snapshot),
            self.generator.snapshot(snapshot, beside=("ema",)),
        )
        write_judge = self.judge.snapshot(snapshot)

        def write(directory: Path) -> None:
            write_engine(directory / "engine" / AUTOENCODER_PART)
            write_generator(directory / "engine" / GENERATOR_PART)
            write_judge(directory)
            if not self.distributed.is_main:
                return
            with torch.device("meta"):  # the copies become its weights: none are made, no random number is drawn
                autoencoder = Autoencoder(self.model.autoencoder.config)
            autoencoder.load_state_dict(state, assign=True)
            save_autoencoder(directory / AUTOENCODER_PART, autoencoder, mean, std)
            folder = directory / GENERATOR_PART
            save_sit(folder, self.sit.config, without_norm(weights), without_norm(ema), mean, std)
            norm = {key: value for key, value in weights.items() if key.startswith(_NORM)}
            save_tensors(directory / LATENT_NORM_FILE, norm)

        return write

    def load(self, directory: Path) -> None:
        """Read what was written of a `snapshot`."""
        autoencoder = read_weights(directory / AUTOENCODER_PART / WEIGHTS_FILE)
        self.engine.load_model({f"{_AUTOENCODER}{key}": value for key, value in autoencoder.items()})
        self.engine.load(directory / "engine" / AUTOENCODER_PART)
        generator = read_weights(directory / GENERATOR_PART / WEIGHTS_FILE)
        self.generator.load_model({**generator, **read_weights(directory / LATENT_NORM_FILE)})
        averages = read_weights(directory / GENERATOR_PART / EMA_FILE)
        self.generator.load(directory / "engine" / GENERATOR_PART, beside={"ema": averages})
        self.judge.load(directory)

    def begin(self) -> int:
        """Take over the state of `start_from`, where that is given. Collective.

        Returns:
            The step after which that state is; 0 without.

        Raises:
            UserError: it is no checkpoint of REPA-E's for these networks, or this run would end before it.
        """
        config = self.config
        if config.start_from is None:
            return 0
        return begin_from(config.start_from, self.engines, config.loop.num_steps, self.distributed)

    @torch.no_grad()
    def preview(self, step: int, directory: Path) -> None:
        """Originals over reconstructions, and samples of the EMA weights decoded by the autoencoder of this step.

        The files are `reconstruction_<step>.png` and `samples_<step>.png`.
        """
        images = self.images.spread(self.NUM_PREVIEW_IMAGES).to(self.device)
        ids = torch.arange(len(images), device=self.device)
        key = philox.make_key(self.config.seed, step, self.device)
        self.model.eval()
        output = self.engine(to_model_range(images), self.sit.bn.statistics(), key, ids, None)
        self.model.train()
        ema = self.generator.full_state("ema")
        if not self.distributed.is_main:
            return
        pictures = torch.cat([images, to_uint8(output.reconstruction)])
        save_grid(directory / f"reconstruction_{step:08d}.png", pictures, columns=len(images))
        sit = SiT(self.sit.config)
        sit.load_state_dict(without_norm(ema))
        decoder = LatentDecoder(self.model.autoencoder, *self.sit.bn.averaged())
        ids = torch.arange(self.config.preview.num_samples, device=self.device)
        batches = generate(sit.to(self.device), decoder, ids, self.config.preview)
        pictures = torch.cat([batch.images for batch in batches])
        save_grid(directory / f"samples_{step:08d}.png", pictures, columns=math.isqrt(len(pictures)))


def without_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `NormalisingSiT` as that of a `SiT`."""
    return {key: value for key, value in state.items() if not key.startswith(_NORM)}


def train_e2e(config: E2ETrainConfig, planned: PlannedMemory | None = None) -> int:
    """Run or resume an end-to-end run; returns the exit code (see `train.loop.fit`). Collective.

    planned: what a plan says of its memory, for the advice where a device has none left.
    """
    distributed = init_distributed(timeout_s=config.loop.start_timeout_s, records=config.run)
    with distributed.all_or_none():
        images = TrainingImages(config.data, config.seed, config.engine.accumulation_steps, distributed)
    run = RunDirectory(
        config.run,
        config,
        distributed,
        may_change=(
            "run",
            "loop",
            "logging",
            "engine",
            "preview",
            *HOW_IMAGES_ARE_READ,
            "init_from",
            "generator_from",
            "start_from",
            "discriminator_from",
            "repa.foundation.weights",
            "loss.perceptual.weights",
            "loss.perceptual.heads",
            "replay",
            "dry_run",
        ),
        writes=config.replay is None,
    )
    stage = E2EStage(config, images, distributed)
    if config.replay is not None:
        return replay(stage, run, config.replay, distributed, stage.begin)
    return fit(
        stage, config.loop, run, config.data.global_batch, distributed, config.logging,
        planned=planned, begin=stage.begin,
    )  # fmt: skip
