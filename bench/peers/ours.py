"""Our side of a comparison: a stage of `sendvae_fast.train` with the peer's weights, and the numbers it draws."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from bench.peers.case import Column
from bench.peers.first_step import FirstStep
from bench.step_cases import StepCase
from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.ops import philox
from sendvae_fast.train.sit.flow_losses import draw_noise_levels
from sendvae_fast.train.sit.latent_batches import LatentBatch

ENGINE = {"name": "ddp"}  # one rank: no engine at all
Weights = dict[str, dict[str, Tensor]]
"""State dicts in our layout, by the stage's names of its engines."""


class Draws(NamedTuple):
    """What our step 0 draws, for the peer's first step to take in place of its own draws; all on the CPU."""

    posterior: Tensor
    """ε₁ of the latents [B, C, H, W]."""
    noise: Tensor
    """ε₂ of the flow [B, C, H, W]."""
    t: Tensor
    """Noise levels [B]."""
    dropped: Tensor
    """Which labels are dropped, bool [B]."""


def draws_of(ids: Tensor, latent_shape: tuple[int, ...], *, label_dropout: float, logit_normal: bool) -> Draws:
    """The draws of samples `ids` with latents [C, H, W] at step 0 of seed 0."""
    key = philox.make_key(0, 0)
    posterior, noise = (
        philox.normal(key, stream, ids, latent_shape) for stream in (philox.Stream.POSTERIOR, philox.Stream.INTERPOLANT)
    )
    uniform = philox.uniform(key, philox.Stream.TIME, ids, 1)[:, 0]
    t = draw_noise_levels(key, ids) if logit_normal else uniform
    return Draws(posterior, noise, t, philox.uniform(key, philox.Stream.LABEL_DROPOUT, ids, 1)[:, 0] < label_dropout)


class OurStep:
    """Our step, with given weights.

    Args:
        case: what is built.
        column: its precision, and whether it is compiled.
        weights: of every engine.
        features: the foundation model's of the batch [B, N, D], which no model is run for; None for a step without.
        device: where it runs.
        scratch: a folder for what the case needs in files.
    """

    def __init__(
        self,
        case: StepCase,
        column: Column,
        weights: Weights,
        features: Tensor | None,
        device: torch.device,
        scratch: Path,
    ) -> None:
        engine = {**ENGINE, "compile": column.compile != "none", "precision": column.precision}
        self.stage: Any = case.build(scratch, engine, init_distributed(device.type))
        for name, engine in self.stage.engines.items():
            engine.load_model({**engine.full_state("model"), **weights[name]})
        if features is not None:
            given = features.to(device)
            self.stage.foundation = lambda images: given
        self.batch: ImageBatch | LatentBatch = case.batch(self.stage.config, device)

    def __call__(self) -> None:
        self.stage.train_step(1, self.batch)

    def first(self) -> FirstStep:
        """The first step, with its losses and gradients."""
        gradients: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for name, engine in self.stage.engines.items():
                stack.enter_context(patch.object(engine, "queue_step", _noting(engine, f"{name}.", gradients)))
            losses = self.stage.train_step(0, self.batch)
        return FirstStep({name: float(value) for name, value in losses.items()}, gradients)


def _noting(engine: Engine, prefix: str, gradients: dict[str, Tensor]) -> Any:
    """`queue_step` of an engine, which puts the gradients it is about to clip into `gradients`."""
    queue_step = engine.queue_step

    def noted() -> Tensor | float:
        for name, parameter in engine.trained.items():
            assert parameter.grad is not None
            gradients[prefix + name] = parameter.grad.detach().float().cpu().clone()
        return queue_step()

    return noted
