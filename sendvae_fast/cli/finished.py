"""A run that is finished says so at once, before the seconds that PyTorch takes to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sendvae_fast.config import merge, parse_overrides, read_files
from sendvae_fast.errors import UserError
from sendvae_fast.reading import read_json, read_yaml


def words_of_finished_run(verb: str, files: list[Path], overrides: list[str]) -> str | None:
    """What to say where a training command repeats that of a run that is finished; None in every other case.

    The command's settings must be those recorded in the run, and the last step's checkpoint must have all its files at
    their sizes. In doubt the answer is None: the run is then opened as any other, and whatever is wrong is said there.

    Args:
        verb: "train vae" or its like.
        files: the configs of the command line.
        overrides: its other arguments.
    """
    try:
        given = merge(read_files(files), parse_overrides(overrides))
        run = Path(given["run"])
        recorded = read_yaml(run / "config.yaml", "")
        num_steps = recorded["loop"]["num_steps"]
        checkpoint = run / "checkpoints" / f"step_{num_steps:08d}"
        manifest = read_json(checkpoint / "manifest.json", "")
        if manifest["step"] != num_steps or not all(_is_recorded(recorded, key, value) for key, value in _flat(given)):
            return None
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        if not sizes or any((checkpoint / name).stat().st_size != size for name, size in sizes.items()):
            return None
    except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return None
    return (
        f"{verb}: {run} is finished, at step {num_steps:,}; saved in {checkpoint}; `sendvae report {run}` shows it, "
        "--loop.num_steps goes further"
    )


def _flat(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value


def _is_recorded(recorded: Any, path: tuple[str, ...], value: Any) -> bool:
    """Whether a run was recorded with a value, which may be the text of a command line."""
    for key in path:
        recorded = recorded[key]
    if isinstance(value, str) and value != recorded:
        read = yaml.safe_load(value)
        if isinstance(recorded, float) and not isinstance(recorded, bool):
            return float(read) == recorded  # YAML takes 3e-4 for a word
        return type(read) is type(recorded) and read == recorded
    return value == recorded
