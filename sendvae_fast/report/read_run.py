"""A run directory as the report sees it: what was logged, measured and drawn, and with which settings."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import RESULTS_FILE as EVALUATION_FILE
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.png import read_png
from sendvae_fast.reading import read_json, read_json_lines, read_yaml, reading
from sendvae_fast.report.contents import Picture, RunRecord

NOT_SERIES = ("step", "time_s")
NOT_CURVES = "evaluation/"
"""Beginning of what the run's results say better: with intervals, counts and protocols."""
MAX_STEP = 2**53
MAX_VALUE = 1e300
PREVIEW_CAPTIONS = {
    "reconstruction": "Top row: originals. Bottom row: what the autoencoder makes of them.",
    "samples": "Pictures drawn from the generator's averaged weights.",
}

WEIGHTS_FILE = "model.safetensors"


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run: the last part of its path, or as many of the last parts as tell it from the others.

    Raises:
        UserError: one is given twice.
    """
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for folder, own in zip(folders, parts, strict=True):
        if parts.count(own) > 1:
            raise UserError(f"{folder} is given twice; give each run once")
    count = 1
    while len({own[-count:] for own in parts}) < len(parts):
        count += 1
    return ["/".join(own[-count:]) for own in parts]


def read_run(path: Path, name: str) -> RunRecord:
    """The record of a run directory. Raises UserError if it is none."""
    for needed in ("config.yaml", "metrics.jsonl"):
        if not (path / needed).is_file():
            raise UserError(f"{path} is not a run directory ({needed} is missing); give the folder of a training run")
    with reading(path / "metrics.jsonl", "repair or remove it"):
        columns, times_s = _read_metrics(path / "metrics.jsonl")
    if not columns:
        raise UserError(f"{path / 'metrics.jsonl'} has no numbers yet; let the run log a step first")
    environment_file = path / "environment.json"
    config = read_yaml(path / "config.yaml", "restore it")
    environment = read_json(environment_file, "restore or remove it") if environment_file.is_file() else {}
    return RunRecord(
        name=name,
        stage="generator" if "velocity" in columns else "autoencoder",
        series={key: (np.array(steps), np.array(values)) for key, (steps, values) in columns.items()},
        duration_s=times_s[-1] - times_s[0] if times_s else 0.0,
        config=config,
        environment=environment,
        results=read_results(path / EVALUATION_FILE),
        num_parameters=_num_parameters(path / "checkpoints"),
    )


def _read_metrics(path: Path) -> tuple[dict[str, tuple[list[int], list[float]]], list[float]]:
    columns: dict[str, tuple[list[int], list[float]]] = {}
    times_s = []
    for entry in read_json_lines(path):
        step = entry.get("step")
        if not isinstance(step, int) or not 0 <= step <= MAX_STEP:
            continue
        if _is_number(entry.get("time_s")):
            times_s.append(float(entry["time_s"]))
        for key, value in entry.items():
            if key not in NOT_SERIES and not key.startswith(NOT_CURVES) and _is_number(value):
                steps, values = columns.setdefault(key, ([], []))
                steps.append(step)
                values.append(float(value))
    return columns, times_s


def _is_number(value: Any) -> bool:
    """Whether a value of a log can be drawn: a finite number, within what a double holds."""
    return isinstance(value, (int, float)) and -MAX_VALUE <= value <= MAX_VALUE


def _num_parameters(checkpoints: Path) -> int | None:
    """Values in the weights of the newest checkpoint, by their file's heading; None where there is none to read."""
    for file in sorted(checkpoints.glob(f"step_*/{WEIGHTS_FILE}"), reverse=True):
        try:
            with safe_open(file, framework="np") as weights:
                return sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            continue
    return None


def previews(directory: Path, kind: str, whose: str = "") -> list[Picture]:
    """The first and the last preview of a kind, `<kind>_<step>.png`; the last alone where there are several runs."""
    steps = {}
    for file in directory.glob(f"{kind}_*.png"):
        found = re.fullmatch(rf"{kind}_(\d+)\.png", file.name)
        if found:
            steps[int(found[1])] = file
    chosen = sorted({max(steps)} if whose else {min(steps), max(steps)}) if steps else []
    return [
        Picture(
            image=read_picture(steps[step]),
            title=f"{whose}, step {step:,}" if whose else f"Step {step:,}",
            caption=PREVIEW_CAPTIONS[kind],
            alt=f"{whose and f'{whose}: '}Preview pictures after {step:,} steps. {PREVIEW_CAPTIONS[kind]}",
        )
        for step in chosen
    ]


def read_picture(path: Path) -> np.ndarray:
    """A PNG, uint8 [H, W, 3]. Raises UserError where it is none."""
    try:
        return read_png(path)
    except OSError as error:
        raise UserError(f"cannot read the picture {path} ({_one_line(error)}); make it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
