"""A device without memory left: what held it, and which settings would need less."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic

PlannedMemory = Callable[[int], str]
"""What a plan says of the run's memory on so many ranks, and of settings that take less."""


@contextmanager
def advising_on_memory(
    run: RunDirectory, distributed: Distributed, planned: PlannedMemory | None = None
) -> Iterator[None]:
    """Context of training in which a device that has no memory left is a `UserError` with advice.

    On a GPU PyTorch's summary of its memory and a snapshot of its blocks are written into the run before:
    ``memory_rank<r>.txt`` and ``.json``. Leaving the process by this error closes the process group, so that the other
    ranks do not wait.

    Args:
        run: for its settings, and to write into.
        distributed: the ranks.
        planned: asked for the numbers; without it the advice has none.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = f"rank {distributed.rank} has no memory left on {distributed.device}: {advice(run.config, distributed)}"
        if distributed.device.type == "cuda":
            path = run.path / f"memory_rank{distributed.rank}"
            with suppress(OSError):  # the advice is worth more
                write_atomic(path.with_suffix(".txt"), torch.cuda.memory_summary(distributed.device))
                snapshot = json.dumps(torch.cuda.memory_snapshot(), default=str)
                write_atomic(path.with_suffix(".json"), snapshot)
                words += f"; what held it is in {path}.txt and .json"
        with suppress(Exception):  # a plan that fails must not hide what has happened
            words += "" if planned is None else f"; {planned(distributed.world_size)}"
        raise UserError(f"{words}; the same command goes on from the newest checkpoint") from error


def advice(config: Mapping[str, Any], distributed: Distributed) -> str:
    """Settings that need less memory, those that change no result first.

    Args:
        config: of the run, as plain values.
        distributed: the ranks.
    """
    engine, batch = config.get("engine", {}), config.get("data", {}).get("global_batch", 1)
    per_rank = batch // (distributed.world_size * engine.get("accumulation_steps", 1))
    ways = []
    for setting, changes in smaller_engines(config, distributed.world_size):
        if "accumulation_steps" in changes:
            setting += f" (then {per_rank // 2} pictures at once on a rank, now {per_rank})"
        elif "zero_stage" in changes:
            setting += ", which splits more over the ranks"
        ways.append(setting)
    ways.append(f"a smaller data.global_batch (now {batch}; another run)")
    return "try, in this order, " + "; ".join(ways)


def smaller_engines(config: Mapping[str, Any], num_ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of the engine that take less memory: as they are given, and as changes of its fields.

    Args:
        config: of the run, as plain values.
        num_ranks: over which its batch is split.
    """
    engine = config.get("engine", {})
    steps, batch = engine.get("accumulation_steps", 1), config.get("data", {}).get("global_batch", 1)
    if batch // (num_ranks * steps) > 1:
        yield f"engine.accumulation_steps={2 * steps}", {"accumulation_steps": 2 * steps}
    if not engine.get("recompute") and engine.get("zero_stage") != 3:
        yield "engine.recompute=true", {"recompute": True}
    if engine.get("precision") == "fp32":
        yield "engine.precision=bf16", {"precision": "bf16"}
    is_split = engine.get("name") == "deepspeed"
    stage = engine.get("zero_stage", 0) if is_split else 0
    if num_ranks > 1 and stage < 3:
        setting = f"{'' if is_split else 'engine.name=deepspeed '}engine.zero_stage={stage + 1}"
        yield setting, {"name": "deepspeed", "zero_stage": stage + 1}
