"""A plan of a run: what it takes of each GPU, of time, money and disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.data.latents.lightningdit import PublishedLatents
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.storage import convolutional, load_autoencoder
from sendvae_fast.plan.fake_step import FakeStep, Surroundings, TrainConfig, fake_step
from sendvae_fast.plan.memory import Memory, memory_of
from sendvae_fast.plan.settings import IMAGENET_BYTES, IMAGENET_PICTURES, PlanConfig
from sendvae_fast.plan.speed import StepTime, step_time
from sendvae_fast.train.sit.settings import SiTTrainConfig

EPOCHS = (80, 800)
"""The lengths of the paper's runs."""
LATENT_BYTES = 2 * 2
"""Of a number of a latent in a cache of --dtype=bfloat16: mean and standard deviation."""
MAX_ON_A_GPU = 1 << 16
"""Pictures; no search goes further."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One configuration on some GPUs. Sizes in bytes, times in seconds."""

    gpus: int
    gpu: str
    engine: str
    precision: str
    global_batch: int
    accumulation_steps: int
    pictures_at_once: int
    """On a GPU, in a micro-batch."""
    num_parameters: dict[str, int]
    memory: Memory
    gpu_bytes: float
    largest_at_once: int | None
    """Pictures on a GPU that fit; None where not even one does. Not looked for in a sweep."""
    flops_per_image: dict[str, int] | None
    time: StepTime | None
    """None for precisions and networks whose time the model does not know."""
    steps: int
    """Of the run."""
    num_images: int
    latent_bytes: float
    """Of all latents on disk, in bfloat16 without flips."""
    read_bytes_per_s: float | None
    """That pictures and latents are read with, over all GPUs."""
    price: float | None

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.memory.total <= self.gpu_bytes

    @property
    def images_per_s(self) -> float | None:
        """Over all GPUs."""
        return None if self.time is None else self.global_batch / self.time.total_s

    def hours(self, steps: int) -> float | None:
        """Hours of so many steps."""
        return None if self.time is None else steps * self.time.total_s / 3600

    def steps_of(self, epochs: int) -> int:
        """Steps of so many epochs, each without its incomplete batch."""
        return epochs * (self.num_images // self.global_batch)

    def cost(self, steps: int) -> float | None:
        """The price of so many steps."""
        hours = self.hours(steps)
        return None if hours is None or self.price is None else hours * self.gpus * self.price

    def as_json(self) -> dict[str, Any]:
        """All of it, and what follows from it, as plain values."""
        lengths = {"run": self.steps} | {f"{epochs} epochs": self.steps_of(epochs) for epochs in EPOCHS}
        return dataclasses.asdict(self) | {
            "memory_total": self.memory.total,
            "fits": self.fits,
            "images_per_s": self.images_per_s,
            "step_s": None if self.time is None else self.time.total_s,
            "lengths": {
                name: {"steps": steps, "hours": self.hours(steps), "cost": self.cost(steps)}
                for name, steps in lengths.items()
            },
        }


class Planner:
    """Makes plans of one configuration. Each size of a micro-batch is pretended once.

    Args:
        config: of the run; the files it names need not be there.
        plan: the machines and the assumptions.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(self, config: TrainConfig, plan: PlanConfig) -> None:
        self.config, self.plan = _with_sizes_of_weights(config), plan
        self.around = surroundings(self.config, plan)
        self.num_images = plan.num_images or _pictures_of(config) or IMAGENET_PICTURES
        self._step = cache(self._pretend)

    def one(self) -> Plan:
        """The plan on the GPUs that are given."""
        engine, accumulates, share = self.config.engine, self.config.engine.accumulation_steps > 1, self._share()
        fits = self._search(lambda size: self._step(size, accumulates), share)
        return self._plan(self._step(share, accumulates), self.plan, engine.accumulation_steps, fits)

    def memory(self) -> Memory:
        """That plan's memory alone: one pretended step."""
        step = self._step(self._share(), self.config.engine.accumulation_steps > 1)
        return memory_of(step, self.config.engine, self.plan.gpus)

    def _share(self) -> int:
        """Pictures of a micro-batch on a GPU."""
        engine, batch = self.config.engine, self.config.data.global_batch
        share, rest = divmod(batch, self.plan.gpus * engine.accumulation_steps)
        if rest or not share:
            raise UserError(
                f"data.global_batch={batch} must be a multiple of GPUs x accumulation steps = {self.plan.gpus} x "
                f"{engine.accumulation_steps}"
            )
        return share

    def sweep(self) -> list[Plan]:
        """Plans of 1, 2, 4 ... 1,024 GPUs, as many as the batch divides among, with as few micro-batches as fit.

        Between two sizes of a micro-batch that are pretended, and beyond them, memory is a straight line.
        """
        plans = []
        for gpus in (2**power for power in range(11)):
            plan = dataclasses.replace(self.plan, gpus=gpus)
            if self.config.data.global_batch % gpus == 0:
                plans.append(self._with_fewest_steps(plan, self.config.data.global_batch // gpus))
        return plans

    def _with_fewest_steps(self, plan: PlanConfig, share: int) -> Plan:
        """The plan with the fewest accumulation steps that fit; with one picture at once where none does."""
        plans = []
        for count in (count for count in range(1, share + 1) if share % count == 0):
            plans.append(self._plan(self._on_line(share // count, count > 1), plan, count, None))
            if plans[-1].fits:
                break
        return plans[-1]

    def _on_line(self, size: int, accumulates: bool) -> FakeStep:
        low, high = (self._step(count, accumulates) for count in (4, 8))

        def at(name: str) -> int:
            begin, end = getattr(low, name), getattr(high, name)
            return round(begin + (end - begin) * (size - low.num_pictures) / (high.num_pictures - low.num_pictures))

        names = ("peak_activations", "peak_with_gradients", "activations_at_peak")
        return dataclasses.replace(high, num_pictures=size, **{name: at(name) for name in names})

    def _pretend(self, size: int, accumulates: bool) -> FakeStep:
        engine = dataclasses.replace(self.config.engine, accumulation_steps=2 if accumulates else 1)
        return fake_step(dataclasses.replace(self.config, engine=engine), size, self.around)

    def _search(self, step_of: Callable[[int], FakeStep], share: int) -> int | None:
        """The most pictures at once that a GPU holds: guessed along a straight line, then pretended."""

        def total(size: int) -> float:
            return memory_of(step_of(size), self.config.engine, self.plan.gpus).total

        low, high = (share, 2 * share) if share > 1 else (1, 4)
        slope = (total(high) - total(low)) / (high - low)
        room = self.plan.kind.memory_bytes
        guess = min(MAX_ON_A_GPU, low + int((room - total(low)) / slope))
        while guess > 0 and total(guess) > room:
            guess -= max(1, round((total(guess) - room) / slope))
        return guess if guess > 0 else None

    def _plan(self, step: FakeStep, plan: PlanConfig, accumulation_steps: int, largest: int | None) -> Plan:
        config, engine = self.config, dataclasses.replace(self.config.engine, accumulation_steps=accumulation_steps)
        batch = config.data.global_batch
        time = None
        if step.flops is not None and engine.precision == "bf16":
            time = step_time(
                sum(step.flops.values()) * batch / plan.gpus,
                sum(step.num_parameters.values()),
                engine,
                plan,
                has_ema="EMA" in step.state,
                recomputes=engine.recompute,
            )
        channels, height, width = self.around.latent_shape
        latent_bytes = channels * height * width * LATENT_BYTES
        return Plan(
            gpus=plan.gpus,
            gpu=plan.kind.name,
            engine=engine.name if engine.name == "ddp" else f"ZeRO {engine.zero_stage}",
            precision=engine.precision,
            global_batch=batch,
            accumulation_steps=accumulation_steps,
            pictures_at_once=step.num_pictures,
            num_parameters=dict(step.num_parameters),
            memory=memory_of(step, engine, plan.gpus),
            gpu_bytes=plan.kind.memory_bytes,
            largest_at_once=largest,
            flops_per_image=None if step.flops is None else dict(step.flops),
            time=time,
            steps=config.loop.num_steps,
            num_images=self.num_images,
            latent_bytes=self.num_images * latent_bytes,
            read_bytes_per_s=None if time is None else batch / time.total_s * _bytes_read(config, latent_bytes),
            price=plan.price,
        )


def surroundings(config: TrainConfig, plan: PlanConfig) -> Surroundings:
    """What a step depends on beside its settings: from the files where they are there, else from the plan's options."""
    size = config.data.image_size
    if not isinstance(config, SiTTrainConfig):
        grid = size // config.autoencoder.downsampling
        return Surroundings(plan.num_classes, (config.autoencoder.latent_channels, grid, grid))
    latents = None if plan.latent is not None else _open_latents(config.latents)
    if latents is not None:
        return Surroundings(plan.num_classes, latents.rows.shape)
    if plan.latent is not None:
        return Surroundings(plan.num_classes, plan.latent)
    is_f16 = config.generator.sizes()["patch_size"] == 1
    shape = (32, size // 16, size // 16) if is_f16 else (4, size // 8, size // 8)
    return Surroundings(plan.num_classes, shape)


def _open_latents(where: str) -> LatentCache | PublishedLatents | None:
    path = Path(where)
    if not path.is_dir():
        return None
    return PublishedLatents.open(where) if PublishedLatents.is_here(path) else LatentCache.open(where)


def _pictures_of(config: TrainConfig) -> int | None:
    """The number of training pictures, where they are here."""
    if isinstance(config, SiTTrainConfig) and (latents := _open_latents(config.latents)) is not None:
        return len(latents)
    root = config.data.root
    return len(Catalog.open(root)) if root is not None and Path(root).exists() else None


def _with_sizes_of_weights(config: TrainConfig) -> TrainConfig:
    """The settings with the sizes of the autoencoder to start from, where it is here and they leave them out."""
    if isinstance(config, SiTTrainConfig) or config.init_from is None or not Path(config.init_from).exists():
        return config
    if config.autoencoder != AutoencoderConfig():
        return config
    found = load_autoencoder(resolve_weights(config.init_from), scaling_factor=1.0).autoencoder
    return dataclasses.replace(config, autoencoder=convolutional(found, f"init_from={config.init_from}").config)


def _bytes_read(config: TrainConfig, latent_bytes: int) -> float:
    """Bytes that are read for a picture: an average JPEG of ImageNet, its latent, or both."""
    jpeg = IMAGENET_BYTES / IMAGENET_PICTURES
    if not isinstance(config, SiTTrainConfig):
        return jpeg
    return latent_bytes + (jpeg if config.repa.weight > 0 else 0)
