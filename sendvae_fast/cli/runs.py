"""List training runs: what each is doing, how far it is, when it ends, its last loss, its size.

    sendvae runs
    sendvae runs runs/paper --json

A run is running while a job holds its lock. Paused ones go on when their command is run again.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sendvae_fast.engine.run_facts import RunFacts, run_facts
from sendvae_fast.errors import UserError

POSITIONAL = "folder"
MAX_DEPTH = 4
"""Folders below the given one in which runs are looked for."""
NOT_RUNS = {"checkpoints", "samples", "tensorboard", "profile", "wandb"}


@dataclass(kw_only=True)
class Config:
    """Where to look."""

    folder: str = "runs"
    """Folder with runs in it, or in its folders; or a run."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    """Print them, those that were written to last first."""
    folder = Path(config.folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the one with your runs, `sendvae runs FOLDER`")
    found = sorted((run_facts(path) for path in find_runs(folder)), key=lambda facts: -(facts.last_s or 0.0))
    if config.json:
        print(json.dumps([dataclasses.asdict(facts) for facts in found], indent=1))
    elif not found:
        print(f"no runs in {folder}")
    else:
        print_table(found)


def find_runs(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """The run directories in a folder, itself included, by name."""
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        yield folder
        return
    if depth == 0:
        return
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except PermissionError:
        return
    for name in names:
        if name not in NOT_RUNS and not name.startswith("."):
            yield from find_runs(folder / name, depth - 1)


def print_table(found: list[RunFacts]) -> None:
    """A line for each."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "stage", "state", "step", "ends", "loss", "size"):
        table.add_column(heading, justify="right" if heading in ("step", "loss", "size") else "left", no_wrap=True)
    for facts in found:
        ends = "" if facts.ends_s is None else time.strftime("%a %d %b %H:%M", time.localtime(facts.ends_s))
        step = f"{facts.step:,}" if facts.num_steps is None else f"{facts.step:,}/{facts.num_steps:,}"
        loss = "" if facts.loss is None else f"{facts.loss:.4g}"
        cells = (facts.run, facts.stage, facts.state, step, ends, loss, f"{facts.bytes / 1e9:.2f} GB")
        table.add_row(*map(escape, cells))
    Console(width=None if Console().is_terminal else 200).print(table)
