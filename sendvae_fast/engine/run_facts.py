"""A run directory from outside: what it is doing, how far it is, how large it is. Nothing in it is changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sendvae_fast.engine.checkpoint_files import FINAL_NAME, MANIFEST
from sendvae_fast.engine.run_lock import is_locked
from sendvae_fast.errors import UserError
from sendvae_fast.reading import read_json_lines, read_yaml

LARGEST = 2**53
"""What is beyond is no step, time or loss: somebody else may have written the file."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run without loading it."""

    run: str
    stage: str
    """train vae, train sit or train e2e; "unknown" where its config cannot be read."""
    state: str
    """running: a job holds its lock. finished: the last step has a checkpoint. stopped: there is one to go on from.
    not saved: there is none. damaged: its config cannot be read."""
    step: int
    """Of a run that is running the last that was logged, else that of the newest checkpoint."""
    num_steps: int | None
    loss: float | None
    """The last that was logged."""
    last_s: float | None
    """When that was, in seconds since 1970."""
    ends_s: float | None
    """When a running one ends at the speed of its last line."""
    bytes: int
    """All of its files."""


def run_facts(path: Path) -> RunFacts:
    """Look at a run directory. Checkpoints are taken at their names' and manifests' word."""
    try:
        config: dict[str, Any] | None = read_yaml(path / "config.yaml", "repair it")
    except UserError:
        config = None
    num_steps = None if config is None else _count(_part(config, "loop").get("num_steps"))
    logged = _last_line(path / "metrics.jsonl")
    saved, logged_step = newest_step(path / "checkpoints"), _count(logged.get("step")) or 0
    running = is_locked(path)
    if running:
        state = "running"
    elif config is None:
        state = "damaged"
    elif saved is None:
        state = "not saved"
    else:
        state = "finished" if num_steps is not None and saved >= num_steps else "stopped"
    step = max(logged_step, saved or 0) if running else saved or 0
    last_s, step_ms = _number(logged.get("time_s")), _number(logged.get("step_ms"))
    ends_s = None
    if running and last_s is not None and step_ms is not None and num_steps is not None:
        ends_s = last_s + (num_steps - logged_step) * step_ms / 1e3
    return RunFacts(
        run=str(path),
        stage="unknown" if config is None else stage_of(config),
        state=state,
        step=step,
        num_steps=num_steps,
        loss=_number(logged.get("loss")),
        last_s=last_s,
        ends_s=ends_s,
        bytes=size_of(path),
    )


def newest_step(checkpoints: Path) -> int | None:
    """The step of the newest checkpoint that has a manifest; None where there is none."""
    if not checkpoints.is_dir():
        return None
    names = [(FINAL_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir()]
    return max((int(name[1]) for name, path in names if name and (path / MANIFEST).is_file()), default=None)


def stage_of(config: dict[str, Any]) -> str:
    """The verb that a run's settings are of."""
    if "latents" in config:
        return "train sit"
    return "train e2e" if "generator" in config else "train vae"


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; those that go while it looks count nothing."""
    total, pending = 0, [folder]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_size
            except OSError:
                continue
    return total


def _last_line(metrics: Path) -> dict[str, Any]:
    """The last line of metrics that a step wrote, not an evaluation; empty where there is none."""
    try:
        lines = read_json_lines(metrics)
    except (OSError, ValueError):
        return {}
    return next((line for line in reversed(lines) if "step_ms" in line or "loss" in line), {})


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST else None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if is_number else None
