"""What runs are and where their settings differ, as tables with a column for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sendvae_fast.engine.run import flat
from sendvae_fast.evaluation.epochs_to_fid import Reached, epochs_to, unguided_curve
from sendvae_fast.report.contents import RunRecord
from sendvae_fast.report.metric_names import metric_of

NOT_SETTINGS = ("run",)
"""Keys whose difference says nothing."""
ABSENT = "–"
MAX_SETTING = 200
"""Characters of a setting that the table shows."""
TARGETS = (200.0, 100.0, 50.0, 20.0, 10.0, 5.0, 3.0, 2.0)
"""Distances k of EP_FID@k, of which those are shown that some run has reached, and the next one."""
STAGES = {"autoencoder": "1: autoencoder", "generator": "2: generator"}

Rows = list[tuple[str, list[str]]]
"""(heading, a cell for each run)."""


def facts(runs: Sequence[RunRecord]) -> Rows:
    """Data, parameters, hardware, code, and how much was seen. A row that no run knows is left out."""
    rows = [
        ("Stage", [STAGES[run.stage] for run in runs]),
        ("Data", [_data(run) for run in runs]),
        ("Parameters", [_count(run.num_parameters) for run in runs]),
        ("Hardware", [_hardware(run.environment) for run in runs]),
        ("Code", [_code(run.environment) for run in runs]),
        ("Seed", [str(run.config.get("seed", ABSENT)) for run in runs]),
        ("Steps", [f"{run.last_step:,}" for run in runs]),
        ("Pictures in a step", [_count(run.global_batch) for run in runs]),
        ("Pictures seen", [_count(run.images_seen) for run in runs]),
        ("Epochs", [ABSENT if run.epochs is None else f"{run.epochs:.3g}" for run in runs]),
    ]
    return [(heading, cells) for heading, cells in rows if any(cell != ABSENT for cell in cells)]


def differing_settings(runs: Sequence[RunRecord]) -> Rows:
    """The settings in which runs differ, by dotted key; none for a single run."""
    flats = [flat(dict(run.config)) for run in runs]
    keys = dict.fromkeys(key for settings in flats for key in settings)
    rows = []
    for key in keys:
        cells = [_text(settings[key]) if key in settings else ABSENT for settings in flats]
        if key not in NOT_SETTINGS and len(set(cells)) > 1:
            rows.append((key, cells))
    return rows


def epochs_to_fid(runs: Sequence[RunRecord]) -> tuple[str, Rows] | None:
    """EP_FID@k of runs and what it is of; None where no run has drawn pictures without guidance as it trained.

    Runs that have measured another distance than the first that has one, or drawn another number of pictures, are not
    beside it.
    """
    curves = [None if run.epochs_per_step is None else unguided_curve(run.results, run.epochs_per_step) for run in runs]
    first = next((curve for curve in curves if curve is not None), None)
    if first is None:
        return None
    alike = [curve if curve is not None and curve[::3] == first[::3] else None for curve in curves]
    reached = {
        k: [None if curve is None else epochs_to(curve.epochs, curve.values, k) for curve in alike] for k in TARGETS
    }
    shown = [k for k in TARGETS if any(reached[k])]
    shown += [k for k in TARGETS if k not in shown and k < min(shown, default=TARGETS[0] + 1)][:1]
    name = "FID" if first.metric == "fid" else metric_of(first.metric).label
    rows = [
        (
            f"{name} of {k:g}",
            [
                ABSENT if curve is None else _reached(found, curve.values)
                for curve, found in zip(alike, reached[k], strict=True)
            ],
        )
        for k in shown
    ]
    return f"{name}, {first.num_samples:,} pictures without guidance", rows


def _reached(found: Reached | None, values: Sequence[float]) -> str:
    if found is None:
        return f"not reached (lowest {min(values):.4g})"
    return f"at most {found.epochs:.3g}" if found.at_first else f"{found.epochs:.3g}"


def _data(run: RunRecord) -> str:
    data = run.config.get("data")
    data = data if isinstance(data, Mapping) else {}
    words = [str(run.config["latents"])] if "latents" in run.config else []
    words += [str(data["root"])] if data.get("root") else []
    words += [f"{run.num_pictures:,} pictures"] if run.num_pictures else []
    words += [f"{data['image_size']} px"] if "image_size" in data else []
    return ", ".join(words) or ABSENT


def _hardware(environment: Mapping[str, Any]) -> str:
    gpus, ranks = environment.get("gpus"), environment.get("world_size")
    if isinstance(gpus, list) and gpus:
        words = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(map(str, gpus))]
    elif "cpu_cores" in environment:
        words = [f"CPU, {environment['cpu_cores']} cores"]
    else:
        return ABSENT
    return ", ".join([*words, *([f"{ranks} ranks"] if isinstance(ranks, int) and ranks > 1 else [])])


def _code(environment: Mapping[str, Any]) -> str:
    commit, version = environment.get("git_commit"), environment.get("sendvae_fast")
    short = "" if not isinstance(commit, str) else commit[:10] + (" (modified)" if "modified" in commit else "")
    return " ".join(filter(None, (str(version or ""), short))) or ABSENT


def _count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def _text(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    text = " ".join(text.removesuffix("...\n").split())
    return text if len(text) <= MAX_SETTING else f"{text[:MAX_SETTING]}…"
