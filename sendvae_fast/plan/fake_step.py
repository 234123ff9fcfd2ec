"""A training step that is only pretended: the run's own stage, on fake tensors, with its memory counted.

Fake tensors have shapes and no content, so a step of 64 pictures of a network of any size takes seconds and no memory.
They are a CPU's: the fused ops keep for their backward pass what they keep on a GPU, as do PyTorch's convolutions,
products and flash attention. One rank under plain data parallelism holds all of a step; what more ranks and ZeRO
change is worked out from it (`plan.memory`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.plan.live_bytes import ACTIVATIONS, GRADIENTS, LiveBytes, only_young
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.e2e.stage import E2EStage
from sendvae_fast.train.sit.latent_batches import LatentBatch
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.sit.stage import SiTStage
from sendvae_fast.train.vae.settings import VAETrainConfig
from sendvae_fast.train.vae.stage import VAEStage

TrainConfig = VAETrainConfig | SiTTrainConfig | E2ETrainConfig
Stage = VAEStage | SiTStage | E2EStage

WEIGHTS, FROZEN, MOMENTS, EMA = "weights", "frozen networks", "optimizer", "EMA"


@dataclass(frozen=True)
class Surroundings:
    """What a step depends on beside its settings."""

    num_classes: int
    latent_shape: tuple[int, int, int]
    """[C, H, W] of the latents that `train sit` reads."""


@dataclass(frozen=True)
class FakeStep:
    """What a step on one rank that holds everything was seen to need."""

    num_pictures: int
    """At once, in a micro-batch."""
    state: Mapping[str, int]
    """Bytes of what stays from step to step: `WEIGHTS` in training, `FROZEN` networks with all buffers, `MOMENTS` and
    `EMA`."""
    peak_activations: int
    """Most bytes of the batch and of all that the step makes but gradients."""
    peak_with_gradients: int
    """The same with the gradients that are there at the same time; the most of the sum."""
    activations_at_peak: int
    """Activations at that time."""
    num_parameters: Mapping[str, int]
    """In training, by engine: "vae", "sit", "discriminator"."""
    flops: Mapping[str, int] | None
    """Per picture, by part of the step; None where they cannot be counted."""

    @property
    def gradients_at_peak(self) -> int:
        """Bytes of gradients at the peak of both."""
        return self.peak_with_gradients - self.activations_at_peak


@contextmanager
def _building() -> Iterator[None]:
    """Context in which networks can be built of fake tensors.

    They stay where they are made: a parameter that is a fake tensor cannot be put in another's place (torch 2.15), and
    neither device nor memory layout changes a size.
    """
    move = nn.Module.to
    nn.Module.to = lambda self, *args, **kwargs: self
    try:
        with _NumbersAreZero():
            yield
    finally:
        nn.Module.to = move


class _NumbersAreZero(TorchDispatchMode):
    """Says 0 where a network that is being built asks a fake tensor for its number.

    timm does so for the rates of stochastic depth, which are 0 in all networks here. A step that asked would fail.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0
        return func(*args, **(kwargs or {}))


def fake_step(config: TrainConfig, num_pictures: int, around: Surroundings) -> FakeStep:
    """Pretend one step of `num_pictures` at once, accumulating twice if the settings accumulate at all.

    No file is read: networks have the sizes of the settings.
    """
    repeats = min(config.engine.accumulation_steps, 2)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        with only_young():
            with _building():
                stage = build_stage(without_files(config, repeats), around)
            _claim_state(stage, live)
        state = {kind: size for kind, size in live.now.items() if kind not in (ACTIVATIONS, GRADIENTS)}
        batch = random_batch(stage, repeats * num_pictures, around)
        live.begin()
        stage.train_step(config.loop.num_steps - 1, batch)  # the last: whatever begins late has begun
        counts = {name: sum(x.numel() for x in engine.trained.values()) for name, engine in stage.engines.items()}
        return FakeStep(
            num_pictures=num_pictures,
            state=state,
            peak_activations=live.peak_activations,
            peak_with_gradients=live.peak[ACTIVATIONS] + live.peak[GRADIENTS],
            activations_at_peak=live.peak[ACTIVATIONS],
            num_parameters=counts,
            flops=stage.flops_by_part,
        )


def without_files(config: Any, accumulation_steps: int) -> Any:
    """The same step from random weights, under plain data parallelism, uncompiled and unrecorded."""
    engine = dataclasses.replace(
        config.engine, name="ddp", compile=False, cuda_graph=False, accumulation_steps=accumulation_steps
    )
    changes: dict[str, Any] = {"engine": engine, "init_from": None}
    if isinstance(config, SiTTrainConfig):
        changes |= {"latent_stats": None, "autoencoder": None}
    else:
        perceptual = config.loss.perceptual
        if perceptual is not None:
            perceptual = dataclasses.replace(perceptual, random_weights=True)
        changes |= {"discriminator_from": None, "loss": dataclasses.replace(config.loss, perceptual=perceptual)}
    if isinstance(config, E2ETrainConfig):
        changes |= {"generator_from": None, "start_from": None}
    if isinstance(config, VAETrainConfig):
        alignment = dataclasses.replace(config.alignment, foundation=_random(config.alignment.foundation))
        if alignment.latent_norm == "fixed":  # by the statistics of weights that are not read; of the same size
            alignment = dataclasses.replace(alignment, latent_norm="running")
        changes["alignment"] = alignment
    else:
        changes["repa"] = dataclasses.replace(config.repa, foundation=_random(config.repa.foundation))
    return dataclasses.replace(config, **changes)


def _random(foundation: FoundationConfig) -> FoundationConfig:
    return dataclasses.replace(foundation, weights=None, random_weights=True)


def build_stage(config: Any, around: Surroundings) -> Stage:
    """The stage of a run, on one rank of the CPU, without its data."""
    alone: Any = Distributed()
    images: Any = SimpleNamespace(catalog=SimpleNamespace(class_names=range(around.num_classes)))
    if isinstance(config, VAETrainConfig):
        return VAEStage(config, images, alone)
    if isinstance(config, E2ETrainConfig):
        return E2EStage(config, images, alone)
    channels = around.latent_shape[0]
    cache = SimpleNamespace(
        rows=SimpleNamespace(shape=around.latent_shape),
        latent_mean=torch.zeros(channels),
        latent_std=torch.ones(channels),
    )
    latents: Any = SimpleNamespace(cache=cache, num_classes=around.num_classes)
    return SiTStage(config, latents, alone)


def random_batch(stage: Stage, num_pictures: int, around: Surroundings) -> Any:
    """A batch of the step's shapes."""
    ids = torch.arange(num_pictures)
    size = stage.config.data.image_size
    labels = torch.zeros(num_pictures, dtype=torch.int64)
    images = torch.zeros(num_pictures, 3, size, size, dtype=torch.uint8)
    if not isinstance(stage, SiTStage):
        return ImageBatch(0, ids, images, labels)
    mean, std = (torch.zeros(num_pictures, *around.latent_shape) for _ in range(2))
    return LatentBatch(ids, mean, std, labels, images if stage.foundation is not None else None)


def _claim_state(stage: Stage, live: LiveBytes) -> None:
    """Say of all that a built stage holds what it is for."""
    for engine in stage.engines.values():
        live.claim(WEIGHTS, engine.trained.values())
        for state in engine.optimizer.state.values():
            live.claim(MOMENTS, [state["exp_avg"], state["exp_avg_sq"]])
            live.claim(EMA, [state["ema"]] if "ema" in state else [])
        live.claim_gradients(parameter for parameter in engine.trained.values() if isinstance(parameter, nn.Parameter))
    live.claim_rest(FROZEN)
