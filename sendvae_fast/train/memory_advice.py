"""A device without memory left: what held it, and which settings would need less."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic


@contextmanager
def advising_on_memory(run: RunDirectory, distributed: Distributed) -> Iterator[None]:
    """Context of training in which a device that has no memory left is a `UserError` with advice.

    On a GPU PyTorch's summary of its memory and a snapshot of its blocks are written into the run before:
    ``memory_rank<r>.txt`` and ``.json``. Leaving the process by this error closes the process group, so that the other
    ranks do not wait.
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
        raise UserError(f"{words}; the same command goes on from the newest checkpoint") from error


def advice(config: Mapping[str, Any], distributed: Distributed) -> str:
    """Settings that need less memory, those that change no result first.

    Args:
        config: of the run, as plain values.
        distributed: the ranks.
    """
    engine, data = config.get("engine", {}), config.get("data", {})
    steps, batch = engine.get("accumulation_steps", 1), data.get("global_batch", 1)
    per_rank = batch // (distributed.world_size * steps)
    ways = []
    if per_rank > 1:
        ways.append(
            f"engine.accumulation_steps={2 * steps} (then {per_rank // 2} pictures at once on a rank, now {per_rank})"
        )
    if not engine.get("recompute") and engine.get("zero_stage") != 3:
        ways.append("engine.recompute=true")
    if engine.get("precision") == "fp32":
        ways.append("engine.precision=bf16")
    stage = engine.get("zero_stage", 0) if engine.get("name") == "deepspeed" else 0
    if distributed.world_size > 1 and stage < 3:
        name = "" if engine.get("name") == "deepspeed" else "engine.name=deepspeed "
        ways.append(f"{name}engine.zero_stage={stage + 1}, which splits more over the ranks")
    ways.append(f"a smaller data.global_batch (now {batch}; another run)")
    return "try, in this order, " + "; ".join(ways)
