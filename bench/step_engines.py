"""The same step under each engine: DDP and DeepSpeed's ZeRO stages, on every rank of this process group."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.step_cases import StepCase
from bench.timing import MAX_ROUNDS, MIN_ROUNDS, Timing, rotations
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError

ENGINES = {
    "ddp": {"name": "ddp"},
    **{f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2)},
}
BOUND = 1e-3
"""Relative difference of the first step's losses and gradient norm between engines: order of summation alone."""


def engine_forms(
    case: StepCase, names: list[str], scratch: Path, distributed: Distributed, seconds: float
) -> dict[str, Any]:
    """The row of a case: a step's time under every engine, the slowest rank's, all ranks with batches of this size."""
    steps, losses = {}, {}
    for name in names:
        stage = case.build(scratch, ENGINES[name], distributed)
        batch = case.batch(stage.config, distributed.device)
        losses[name] = {key: float(value) for key, value in stage.train_step(0, batch).items()}
        steps[name] = lambda stage=stage, batch=batch: stage.train_step(1, batch)
    check_equal(losses)
    estimate = {name: _time(step, distributed) for name, step in steps.items()}
    num_rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / sum(estimate.values()))))
    samples_us: dict[str, list[float]] = {name: [] for name in names}
    for _, order in zip(range(num_rounds), rotations(names), strict=False):
        for name in order:
            samples_us[name].append(1e6 * _time(steps[name], distributed))
    images = case.batch_size * distributed.world_size
    results = {}
    for name, samples in samples_us.items():
        timing = Timing.of(samples)
        results[name] = {**asdict(timing), "img_per_s": images * 1e6 / timing.median_us, "losses": losses[name]}
    return {"precision": str(stage.config.engine.dtype).removeprefix("torch."), "engines": results}


def check_equal(losses: dict[str, dict[str, float]]) -> None:
    """Raise a UserError unless every engine's first step had the first engine's losses."""
    (first, wanted), *others = losses.items()
    for name, actual in others:
        for key, value in wanted.items():
            if not abs(actual[key] - value) <= BOUND * max(abs(value), abs(wanted["loss"])):
                raise UserError(
                    f"engine {name} does not compute the step of {first}: {key} is {actual[key]:.6g} instead of "
                    f"{value:.6g}; nothing was timed"
                )


def _time(step: Any, distributed: Distributed) -> float:
    """Seconds of a step that all ranks begin together, until the last has ended; the same number on every rank."""
    distributed.barrier()
    _wait(distributed.device)
    start_s = time.perf_counter()
    step()
    _wait(distributed.device)
    return max(distributed.gather_objects(time.perf_counter() - start_s))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
