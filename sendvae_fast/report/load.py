"""Report data from disk: training runs side by side, or a comparison of variants with its `results.json`."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.latent_space.view import VIEW_FOLDER, LatentView, read_view
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.reading import read_json, reading
from sendvae_fast.report.contents import Picture, ReportData, RunRecord, Step, Variant
from sendvae_fast.report.read_run import names_of, previews, read_picture, read_run
from sendvae_fast.report.summary import (
    comparison_headline,
    comparison_sentences,
    comparison_tiles,
    run_sentences,
    run_tiles,
)

RESULTS_FILE = "results.json"
STAGE_WORDS = {"autoencoder": "Autoencoder training (stage 1)", "generator": "Generator training (stage 2)"}


def load_report(*paths: str | os.PathLike[str]) -> ReportData:
    """The comparison in a single `path` if it holds a `results.json`, else the training runs, side by side.

    Raises:
        UserError: one of them is neither, or is damaged.
    """
    if len(paths) == 1 and (Path(paths[0]) / RESULTS_FILE).is_file():
        with reading(paths[0], "make it again, or repair what is in it"):
            return load_comparison(paths[0])
    return load_runs(*paths)


def load_runs(*paths: str | os.PathLike[str]) -> ReportData:
    """Run directories: their curves, results, first and last preview pictures, configurations and environments.

    Raises:
        UserError: one is not a run, has logged nothing yet or is given twice.
    """
    folders = [Path(path) for path in paths]
    runs, reconstructions, samples, views = [], [], [], []
    for folder, name in zip(folders, names_of(folders), strict=True):
        with reading(folder, "make it again, or repair what is in it"):
            runs.append(read_run(folder, name))
            whose = name if len(folders) > 1 else ""
            reconstructions += previews(folder / "samples", "reconstruction", whose)
            samples += previews(folder / "samples", "samples", whose)
            if (view := read_view(folder / VIEW_FOLDER)) is not None:
                views.append((name, view))
    stages = list(dict.fromkeys(STAGE_WORDS[run.stage] for run in runs))
    alone = len(runs) == 1
    return ReportData(
        title=runs[0].name if alone else f"{len(runs)} runs",
        subtitle=stages[0] if len(stages) == 1 else "Training runs",
        headline=f"{runs[0].last_step:,} steps are logged." if alone else ", ".join(run.name for run in runs),
        summary=run_sentences(runs[0]) if alone else [],
        tiles=run_tiles(runs[0]) if alone else [],
        reconstructions=reconstructions,
        samples=samples,
        latent_views=views,
        runs=runs,
    )


def load_comparison(path: str | os.PathLike[str]) -> ReportData:
    """A comparison of variants: a folder with a `results.json`.

    File names in it are relative to the folder; every key but `variants` and a variant's `name` may be left out:

        {"title": ..., "subtitle": ..., "candidate": "Send-VAE", "control": "Control", "notes": ["...", ...],
         "originals": "originals.png",
         "variants": [{"name": "Control", "description": ..., "evaluations": ["control/evaluation.jsonl"],
                       "reconstructions": "control.png", "samples": "control_samples.png",
                       "latent_space": "control/latent_space",
                       "runs": ["control/vae", "control/sit"]}, ...]}

    While the work goes on, a key `progress` says how far it is, and the page has a section for that:

        "progress": {"written": "14:27:10", "ready": "14:32",
                     "parts": [{"name": "Control: measuring", "state": "to come", "when": "about 14:30"}, ...]}

    `evaluations` are files of `sendvae evaluate`, one per seed, which need not be there yet. Where generators measured
    themselves, `"seeds": [{"seed": 0, "runs": ["control/vae", "control/sit"]}, ...]` gives the runs of each seed;
    `runs` are those whose logs the page shows. `originals` and `reconstructions` are strips of the
    same pictures in the same order; `latent_space` is a folder of `evaluation.latent_space.view`. Sentences put
    `candidate` beside `control`. Raises UserError naming the file or the key that is wrong.
    """
    path = Path(path)
    results = _read_results(path / RESULTS_FILE)
    entries = results["variants"]
    variants = [
        Variant(
            name=entry["name"],
            description=entry.get("description", ""),
            seeds=[read_results(_inside(path, file)) for file in entry.get("evaluations", [])],
            trials=[
                [_read_run(_inside(path, run), entry["name"]) for run in seed.get("runs", [])]
                for seed in entry.get("seeds", [])
            ],
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
        latent_views=_latent_views(path, entries),
        runs=[_read_run(_inside(path, run), entry["name"]) for entry in entries for run in entry.get("runs", [])],
        control=results.get("control", ""),
    )
    data.headline = comparison_headline(variants)
    if "candidate" in results and "control" in results:
        try:
            candidate, control = by_name[results["candidate"]], by_name[results["control"]]
        except KeyError as error:
            known = ", ".join(by_name)
            raise UserError(f"{path / RESULTS_FILE}: no variant is named {error}; there are {known}") from None
        data.summary = [*comparison_sentences(candidate, control), *data.summary]
        data.tiles = comparison_tiles(candidate, control)
    if progress := results.get("progress"):
        data.headline = f"Not finished: everything will be here at about {progress['ready']}."
        data.to_come = [Step(**part) for part in progress["parts"]]
        data.written = progress["written"]
    return data


def _read_run(path: Path, name: str) -> RunRecord:
    """A run of a comparison, whose end-to-end runs stand for their autoencoders."""
    run = read_run(path, name)
    repa = run.config.get("repa")
    is_end_to_end = isinstance(repa, Mapping) and "autoencoder_weight" in repa
    return replace(run, stage="autoencoder") if is_end_to_end else run


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
                image=read_picture(_inside(path, results["originals"])),
                title="Originals",
                caption="",
                alt="A row of pictures from the data.",
            )
        )
    strips += [
        Picture(
            image=read_picture(_inside(path, entry["reconstructions"])),
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
            image=read_picture(_inside(path, entry["samples"])),
            title=entry["name"],
            caption=f"Drawn from the generator that was trained on the latents of {entry['name']}.",
            alt=f"A sheet of generated pictures: {entry['name']}.",
        )
        for entry in entries
        if entry.get("samples")
    ]


def _latent_views(path: Path, entries: list[Mapping[str, Any]]) -> list[tuple[str, LatentView]]:
    found = []
    for entry in entries:
        if folder := entry.get("latent_space"):
            for file in _inside(path, folder).glob("*"):
                _inside(path, str(file.relative_to(path)))
            if (view := read_view(_inside(path, folder))) is not None:
                found.append((entry["name"], view))
    return found


def _inside(folder: Path, name: str) -> Path:
    """A file or folder that `results.json` names. UserError outside of its folder: a page shows what is in there."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / RESULTS_FILE} names {name}, which is outside of its folder: copy it there")
    return path
