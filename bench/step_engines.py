"""The same step under each engine, on every rank of this process group.

DDP, DDP replayed as a CUDA graph, and DeepSpeed's ZeRO stages.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.step_cases import Stage, StepCase
from bench.timing import MAX_ROUNDS, MIN_ROUNDS, Timing, rotations
from sendvae_fast.engine.build import NUM_FIRST_STEPS
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import dtype_of
from sendvae_fast.errors import UserError

ENGINES = {
    "ddp": {"name": "ddp"},
    "ddp_graph": {"name": "ddp", "cuda_graph": True},
    **{f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2)},
}
BOUND = 1e-3
"""Relative difference of the first step's losses and gradient norm between engines: order of summation alone."""


@dataclass(frozen=True)
class Cost:
    """The costs of one step. All but its time are this rank's."""

    step_us: float
    """From when all ranks began it together until the last had ended."""
    cpu_us: float
    """Of all threads, in the system too: what it costs however busy the machine is."""
    page_faults: int
    """Pages of 4 KB that the system had to find for it: buffers made anew."""
    backward_us: float
    """In `Engine.backward` of the stage's own network: gradients are computed and reduced over ranks."""
    update_us: float
    """In its `Engine.queue_step`: norm, optimizer, ZeRO's gathering of the weights."""


def engine_forms(
    case: StepCase, names: list[str], scratch: Path, distributed: Distributed, seconds: float
) -> dict[str, Any]:
    """The row of a case: a step's time under every engine, the slowest rank's, all ranks with batches of this size."""
    steps, losses = {}, {}
    for name in names:
        stage = case.build(scratch, ENGINES[name], distributed)
        batch: Any = case.batch(stage.config, distributed.device)
        losses[name] = {key: float(value) for key, value in stage.train_step(0, batch).items()}
        if stage.config.engine.cuda_graph:
            for _ in range(NUM_FIRST_STEPS):  # with that one more than it takes: the last one is replayed
                stage.train_step(0, batch)
        steps[name] = measured_step(stage, batch, distributed)
    check_equal(losses)
    estimate_us = sum(step().step_us for step in steps.values())
    num_rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(1e6 * seconds / estimate_us)))
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for _, order in zip(range(num_rounds), rotations(names), strict=False):
        for name in order:
            costs[name].append(steps[name]())
    images = case.batch_size * distributed.world_size
    results = {}
    for name, of_engine in costs.items():
        timing = Timing.of([cost.step_us for cost in of_engine])
        results[name] = {**asdict(timing), "img_per_s": images * 1e6 / timing.median_us, "losses": losses[name]}
        if distributed.device.type == "cpu":  # on a GPU the host runs ahead, and its time says little
            of_rank = [asdict(cost) for cost in of_engine]
            results[name]["rank0"] = {
                key: median(cost[key] for cost in of_rank) for key in of_rank[0] if key != "step_us"
            }
    return {"precision": str(dtype_of(stage.config.engine)).removeprefix("torch."), "engines": results}


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


def measured_step(stage: Stage, batch: Any, distributed: Distributed) -> Callable[[], Cost]:
    """A step of the stage, on a batch, with its costs."""
    spent = {"backward": 0.0, "queue_step": 0.0}

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                spent[name] += time.perf_counter() - start_s

        return call

    for name in spent:
        setattr(stage.engine, name, timed(name, getattr(stage.engine, name)))

    def measure() -> Cost:
        spent.update(dict.fromkeys(spent, 0.0))
        distributed.barrier()
        _wait(distributed.device)
        before, start_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        stage.train_step(1, batch)
        _wait(distributed.device)
        took_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_SELF)
        return Cost(
            step_us=1e6 * max(distributed.gather_objects(took_s)),
            cpu_us=1e6 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
            page_faults=after.ru_minflt - before.ru_minflt,
            backward_us=1e6 * spent["backward"],
            update_us=1e6 * spent["queue_step"],
        )

    return measure


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
