"""What is to be played with, from the paths of runs: autoencoders, the generators on their latents, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.errors import UserError
from sendvae_fast.reading import read_json, read_yaml, reading

COMPARISON_FILE = "results.json"
"""In a demo's folder: its variants and their runs, as `report.load_comparison` reads it."""


@dataclass(frozen=True)
class RunPlaces:
    """An autoencoder, with a generator where there is one, and the pictures that they were trained on."""

    name: str
    autoencoder: Path
    """Weight file, folder or checkpoint."""
    generator: Path | None
    image_size: int | None
    """Side of the autoencoder's training pictures in pixels; None where no run says it."""
    pictures: str | None
    """Where those pictures are; None where no run says it."""


def find_runs(paths: Sequence[str], autoencoder: str | None = None) -> list[RunPlaces]:
    """What lies at each path, with names that differ.

    A path is a run of stage 1, a run of stage 2, whose autoencoder its config names, weights of an autoencoder, or a
    demo's folder, which stands for all its variants.

    Args:
        paths: at least one.
        autoencoder: of generators whose run names none.

    Raises:
        UserError: a path is none of these, its checkpoints are missing, or it is given twice.
    """
    found: list[RunPlaces] = []
    for path in paths:
        found += _variants(Path(path)) if (Path(path) / COMPARISON_FILE).is_file() else [_run(Path(path), autoencoder)]
    return _named_apart(found)


def _run(path: Path, autoencoder: str | None) -> RunPlaces:
    weights = resolve_weights(path)
    config = _config_of(weights)
    if "latents" not in config:
        size, pictures = _pictures_of(config)
        return RunPlaces(_short_name(path), weights, None, size, pictures)
    named = autoencoder or config.get("autoencoder")
    if not isinstance(named, str):
        raise UserError(f"the generator {path} does not say whose latents it was trained on: give --autoencoder")
    decoder = resolve_weights(named)
    size, pictures = _pictures_of(_config_of(decoder))
    return RunPlaces(_short_name(path), decoder, weights, size, pictures)


def _variants(root: Path) -> list[RunPlaces]:
    """Of a demo's folder, those whose autoencoder has a checkpoint; they may have been moved, with the folder."""
    content, found = read_json(root / COMPARISON_FILE, "give the run of one variant"), []
    with reading(root / COMPARISON_FILE, "give the run of one variant"):
        for variant in content["variants"]:
            runs = {"latents" in _run_config(root / run): root / run for run in variant.get("runs", ())}
            if False not in runs:
                continue
            generator = None if True not in runs else resolve_weights(runs[True])
            found.append(replace(_run(runs[False], None), name=str(variant["name"]), generator=generator))
    if not found:
        raise UserError(f"no variant in {root} has a trained autoencoder yet: wait for the demo, or run it again")
    return found


def _config_of(weights: Path) -> Mapping[str, Any]:
    """The config of the run of weights; empty for weights outside a run."""
    run = run_of(weights)
    return {} if run is None else _run_config(run)


def _run_config(run: Path) -> Mapping[str, Any]:
    return read_yaml(run / "config.yaml", "give another run")


def _pictures_of(config: Mapping[str, Any]) -> tuple[int | None, str | None]:
    data = config.get("data")
    if not isinstance(data, dict):
        return None, None
    size, root = data.get("image_size"), data.get("root")
    return size if isinstance(size, int) else None, root if isinstance(root, str) else None


def _short_name(path: Path) -> str:
    """The last part of a path that says something: of `runs/demo/send/vae` it is `send/vae`."""
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in ("vae", "sit") else path.name


def _named_apart(found: Sequence[RunPlaces]) -> list[RunPlaces]:
    """The same with a number behind a name that others have. Raises UserError for one that is there twice."""
    taken: dict[str, RunPlaces] = {}
    for places in found:
        if any(replace(other, name=places.name) == places for other in taken.values()):
            raise UserError(f"{places.generator or places.autoencoder} is given twice")
        name, number = places.name, 2
        while name in taken:
            name, number = f"{places.name} ({number})", number + 1
        taken[name] = replace(places, name=name)
    return list(taken.values())
