"""Report data from disk: one training run, or a comparison of variants with its `results.json`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import RESULTS_FILE as EVALUATION_FILE
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.png import read_png
from sendvae_fast.reading import read_json, read_json_lines, read_yaml, reading
from sendvae_fast.report.contents import Picture, ReportData, RunRecord, Step, Variant
from sendvae_fast.report.summary import (
    comparison_headline,
    comparison_sentences,
    comparison_tiles,
    run_sentences,
    run_tiles,
)

RESULTS_FILE = "results.json"
NOT_SERIES = ("step", "time_s")
MAX_STEP = 2**53
MAX_VALUE = 1e300
STAGE_WORDS = {"autoencoder": "Autoencoder training (stage 1)", "generator": "Generator training (stage 2)"}
PREVIEW_CAPTIONS = {
    "reconstruction": "Top row: originals. Bottom row: what the autoencoder makes of them.",
    "samples": "Pictures drawn from the generator's averaged weights.",
}


def load_report(path: str | os.PathLike[str]) -> ReportData:
    """The comparison in `path` if it holds a `results.json`, else the training run. Raises UserError if neither."""
    with reading(path, "make it again, or repair what is in it"):
        return load_comparison(path) if (Path(path) / RESULTS_FILE).is_file() else load_run(path)


def load_run(path: str | os.PathLike[str]) -> ReportData:
    """One run directory: its curves, its first and last preview pictures, its configuration and environment.

    Raises UserError for a folder that is not a run, or one that has logged nothing yet.
    """
    path = Path(path)
    run = read_run(path, name=path.resolve().name)
    return ReportData(
        title=run.name,
        subtitle=STAGE_WORDS[run.stage],
        headline=f"{run.last_step:,} steps are logged.",
        summary=run_sentences(run),
        tiles=run_tiles(run),
        reconstructions=_previews(path / "samples", "reconstruction"),
        samples=_previews(path / "samples", "samples"),
        runs=[run],
        evaluations=read_results(path / EVALUATION_FILE),
    )


def load_comparison(path: str | os.PathLike[str]) -> ReportData:
    """A comparison of variants: a folder with a `results.json`.

    File names in it are relative to the folder; every key but `variants` and a variant's `name` may be left out:

        {"title": ..., "subtitle": ..., "candidate": "Send-VAE", "control": "Control", "notes": ["...", ...],
         "originals": "originals.png",
         "variants": [{"name": "Control", "description": ..., "evaluations": ["control/evaluation.jsonl"],
                       "reconstructions": "control.png", "samples": "control_samples.png",
                       "runs": ["control/vae", "control/sit"]}, ...]}

    While the work goes on, a key `progress` says how far it is, and the page has a section for that:

        "progress": {"written": "14:27:10", "ready": "14:32",
                     "parts": [{"name": "Control: measuring", "state": "to come", "when": "about 14:30"}, ...]}

    `evaluations` are files of `sendvae evaluate`, one per seed. `originals` and `reconstructions` are strips of the
    same pictures in the same order. Sentences put `candidate` beside `control`. Raises UserError naming the file or
    the key that is wrong.
    """
    path = Path(path)
    results = _read_results(path / RESULTS_FILE)
    entries = results["variants"]
    variants = [
        Variant(
            name=entry["name"],
            description=entry.get("description", ""),
            seeds=[read_results(_inside(path, file)) for file in entry.get("evaluations", [])],
        )
        for entry in entries
    ]
    by_name = {variant.name: variant for variant in variants}
    data = ReportData(
        title=results.get("title", path.resolve().name),
        subtitle=results.get("subtitle", ""),
        variants=variants,
        summary=results.get("notes", []),
        reconstructions=_reconstruction_strips(path, results),
        samples=_sample_sheets(path, entries),
        runs=[read_run(_inside(path, run), entry["name"]) for entry in entries for run in entry.get("runs", [])],
    )
    if "candidate" in results and "control" in results:
        try:
            candidate, control = by_name[results["candidate"]], by_name[results["control"]]
        except KeyError as error:
            known = ", ".join(by_name)
            raise UserError(f"{path / RESULTS_FILE}: no variant is named {error}; there are {known}") from None
        data.headline = comparison_headline(variants)
        data.summary = [*comparison_sentences(candidate, control), *data.summary]
        data.tiles = comparison_tiles(candidate, control)
    if progress := results.get("progress"):
        data.headline = f"Not finished: everything will be here at about {progress['ready']}."
        data.to_come = [Step(**part) for part in progress["parts"]]
        data.written = progress["written"]
    return data


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
            if key not in NOT_SERIES and _is_number(value):
                steps, values = columns.setdefault(key, ([], []))
                steps.append(step)
                values.append(float(value))
    return columns, times_s


def _is_number(value: Any) -> bool:
    """Whether a value of a log can be drawn: a finite number, within what a double holds."""
    return isinstance(value, (int, float)) and -MAX_VALUE <= value <= MAX_VALUE


def _read_results(path: Path) -> dict[str, Any]:
    results = read_json(path, "give a folder with the results of a demo")
    entries = results.get("variants")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
        raise UserError(f"{path} needs `variants`, a list of objects with a `name` each")
    return results


def _reconstruction_strips(path: Path, results: Mapping[str, Any]) -> list[Picture]:
    strips = []
    if results.get("originals"):
        strips.append(
            Picture(
                image=_read_picture(_inside(path, results["originals"])),
                title="Originals",
                caption="",
                alt="A row of pictures from the data.",
            )
        )
    strips += [
        Picture(
            image=_read_picture(_inside(path, entry["reconstructions"])),
            title=entry["name"],
            caption="",
            alt=f"The same pictures after {entry['name']} encoded and decoded them.",
        )
        for entry in results["variants"]
        if entry.get("reconstructions")
    ]
    return strips


def _sample_sheets(path: Path, entries: list[Mapping[str, Any]]) -> list[Picture]:
    return [
        Picture(
            image=_read_picture(_inside(path, entry["samples"])),
            title=entry["name"],
            caption=f"Drawn from the generator that was trained on the latents of {entry['name']}.",
            alt=f"A sheet of generated pictures: {entry['name']}.",
        )
        for entry in entries
        if entry.get("samples")
    ]


def _previews(directory: Path, kind: str) -> list[Picture]:
    """The first and the last preview of a kind, from `<kind>_<step>.png`."""
    steps = {}
    for file in directory.glob(f"{kind}_*.png"):
        found = re.fullmatch(rf"{kind}_(\d+)\.png", file.name)
        if found:
            steps[int(found[1])] = file
    chosen = sorted({min(steps), max(steps)}) if steps else []
    return [
        Picture(
            image=_read_picture(steps[step]),
            title=f"Step {step:,}",
            caption=PREVIEW_CAPTIONS[kind],
            alt=f"Preview pictures after {step:,} steps. {PREVIEW_CAPTIONS[kind]}",
        )
        for step in chosen
    ]


def _inside(folder: Path, name: str) -> Path:
    """A file or folder that `results.json` names. UserError outside of its folder: a page shows what is in there."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / RESULTS_FILE} names {name}, which is outside of its folder: copy it there")
    return path


def _read_picture(path: Path) -> np.ndarray:
    try:
        return read_png(path)
    except OSError as error:
        raise UserError(f"cannot read the picture {path} ({_one_line(error)}); make it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
