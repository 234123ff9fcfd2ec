"""The losses of a generator in training, from noised latents on.

Shape letters: B batch, N tokens, D the foundation model's width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sendvae_fast.engine.engine import Engine
from sendvae_fast.losses.alignment import alignment_loss
from sendvae_fast.losses.velocity import velocity_direction_loss, velocity_loss
from sendvae_fast.ops import philox
from sendvae_fast.ops.noise_inject import NoiseInjectOutput
from sendvae_fast.train.sit.settings import FlowConfig, GeneratorConfig, RepaConfig


class FlowSettings(Protocol):
    """The sections of a run's settings that a generator's losses depend on."""

    @property
    def generator(self) -> GeneratorConfig: ...
    @property
    def flow(self) -> FlowConfig: ...
    @property
    def repa(self) -> RepaConfig: ...


def draw_noise_levels(key: Tensor, sample_ids: Tensor) -> Tensor:
    """Logit-normal noise levels of the samples, float32 [B]. Uniform ones `noise_inject` draws in passing."""
    return philox.normal(key, philox.Stream.TIME, sample_ids, ()).sigmoid()


def flow_losses(
    engine: Engine,
    settings: FlowSettings,
    noised: NoiseInjectOutput,
    labels: Tensor,
    key: Tensor,
    sample_ids: Tensor,
    target: Tensor | None,
) -> dict[str, Tensor]:
    """Run a SiT on noised latents; its loss under "loss", beside the terms. All are float32 scalars.

    Args:
        engine: of the SiT.
        settings: weights of the terms, and the share of labels that are dropped.
        noised: what `noise_inject` made of the latents.
        labels: classes, int64 [B].
        key: of the step, from which the dropped labels are drawn.
        sample_ids: int64 [B].
        target: the foundation model's features [B, N, D], or None without REPA.
    """
    velocity, features = predict(engine, settings, noised.z_t, noised.t, labels, key, sample_ids, target is not None)
    losses = {"velocity": velocity_loss(velocity, noised.velocity)}
    loss = losses["velocity"]
    if settings.flow.direction_weight > 0:
        losses["direction"] = velocity_direction_loss(velocity, noised.velocity)
        loss = loss + settings.flow.direction_weight * losses["direction"]
    return with_alignment(loss, losses, settings, features, target)


def predict(
    engine: Engine,
    settings: FlowSettings,
    z_t: Tensor,
    t: Tensor,
    labels: Tensor,
    key: Tensor,
    sample_ids: Tensor,
    return_features: bool,
) -> tuple[Tensor, Tensor | None]:
    """A generator's forward pass in training, with the labels dropped that the step drops; see `SiT.forward`."""
    draw = philox.uniform(key, philox.Stream.LABEL_DROPOUT, sample_ids, 1)[:, 0]
    return engine(z_t, t, labels, draw < settings.generator.label_dropout, return_features=return_features)


def with_alignment(
    loss: Tensor, losses: dict[str, Tensor], settings: FlowSettings, features: Tensor | None, target: Tensor | None
) -> dict[str, Tensor]:
    """`loss`, with the alignment where there is a target, under "loss" before the terms."""
    if features is not None and target is not None:
        losses["align"] = alignment_loss(features, target)
        loss = loss + settings.repa.weight * losses["align"]
    return {"loss": loss, **losses}
