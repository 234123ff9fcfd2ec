"""How fast generators learn: the distance of their pictures against steps and hours, over seeds, and speed-ups.

The speed-up to reach X is that of the papers: how many times fewer steps (or hours) a generator takes until its
pictures are as near to real ones as the control's are at the end of its training. X is the control's of the same seed.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from sendvae_fast.evaluation.epochs_to_fid import Reached, epochs_to, unguided_curve
from sendvae_fast.evaluation.intervals import interval_over_runs
from sendvae_fast.report.charts import STEP, line_chart
from sendvae_fast.report.contents import RunRecord, Variant
from sendvae_fast.report.metric_names import metric_of

ABSENT = "–"
HOUR_S = 3600.0


@dataclass(frozen=True)
class LearningCurve:
    """The distance of a generator's pictures over its training, with one seed."""

    metric: str
    num_samples: int
    steps: np.ndarray
    """Of the generator, float64 [n], ascending."""
    hours: np.ndarray
    """Float64 [n]: what its autoencoder's own training took and what the generator's took so far."""
    values: np.ndarray
    """Float64 [n]."""


def learning_curve(runs: Sequence[RunRecord]) -> LearningCurve | None:
    """Of the runs of a trial; None where its generator has measured nothing yet."""
    before_h = sum(float(hours_at(run, np.array([run.last_step]))[0]) for run in runs if run.stage == "autoencoder")
    for run in runs:
        curve = unguided_curve(run.results, 1.0) if run.stage == "generator" else None
        if curve is not None and curve.values:
            steps = np.array(curve.epochs)
            hours = before_h + hours_at(run, steps)
            return LearningCurve(curve.metric, curve.num_samples, steps, hours, np.array(curve.values))
    return None


def hours_at(run: RunRecord, steps: np.ndarray) -> np.ndarray:
    """Hours that training took up to some steps, times its ranks; its evaluations and checkpoints are not in it."""
    if run.global_batch is None or "img_per_s" not in run.series:
        return np.full(len(steps), np.nan)
    ranks = run.environment.get("world_size")
    logged, rates = run.series["img_per_s"]
    order = np.argsort(logged, kind="stable")
    logged, rates = logged[order].astype(np.float64), np.maximum(rates[order], 1e-9)
    seconds = np.cumsum(np.diff(logged, prepend=0.0) * run.global_batch / rates)
    factor = (ranks if isinstance(ranks, int) and ranks > 0 else 1) / HOUR_S
    return factor * np.interp(steps, np.append(0.0, logged), np.append(0.0, seconds))


def learning(variants: Sequence[Variant], control: str) -> dict[str, Any] | None:
    """The section: its words, legend, charts (title, svg) and rows of speed-ups; None without curves.

    Variants that have measured another distance, or of another number of pictures, than the first are left out.
    """
    by_name = {variant.name: [learning_curve(runs) for runs in variant.trials] for variant in variants}
    first = next((curve for curves in by_name.values() for curve in curves if curve is not None), None)
    if first is None:
        return None
    kind = first.metric, first.num_samples
    alike = {
        name: [curve if curve is not None and (curve.metric, curve.num_samples) == kind else None for curve in curves]
        for name, curves in by_name.items()
    }
    colours = {variant.name: index for index, variant in enumerate(variants)}
    label = metric_of(first.metric).label
    is_gpu = any(run.environment.get("gpus") for variant in variants for runs in variant.trials for run in runs)
    hours = "GPU-hours" if is_gpu else "hours of a process"
    charts = [
        {"title": f"{label} against {words}", "svg": _chart(alike, colours, against, label, number)}
        for number, (against, words) in enumerate(((STEP, "steps"), (hours, hours)))
    ]
    return {
        "what": f"{label} of {first.num_samples:,} pictures without guidance, measured while the generators trained",
        "legend": [(name, colours[name]) for name, curves in alike.items() if any(curves)],
        "charts": [chart for chart in charts if chart["svg"]],
        "hours": hours,
        "control": control,
        "rows": speed_ups(alike, control),
        "several": max(sum(curve is not None for curve in curves) for curves in alike.values()) > 1,
    }


def mean_curve(
    curves: Sequence[LearningCurve | None], against: str
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None] | None:
    """Over seeds: places [n], means [n], and 95 % intervals where there are several seeds.

    Steps at which some seed has not been measured are left out, as a seed alone would move the mean.
    """
    known = [curve for curve in curves if curve is not None]
    if not known:
        return None
    steps = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in known)))
    if not steps:
        return None
    at = [[int(np.flatnonzero(curve.steps == step)[0]) for step in steps] for curve in known]
    values = np.array([curve.values[index] for curve, index in zip(known, at, strict=True)])  # [seeds, n]
    places = np.array(steps)
    if against != STEP:
        places = np.mean([curve.hours[index] for curve, index in zip(known, at, strict=True)], axis=0)
    bounds = [interval_over_runs(column.tolist()) for column in values.T]
    low_high = np.array([bound for bound in bounds if bound is not None])
    return places, values.mean(axis=0), (low_high[:, 0], low_high[:, 1]) if len(known) > 1 else None


def speed_ups(curves: Mapping[str, Sequence[LearningCurve | None]], control: str) -> list[tuple[str, list[str]]]:
    """Of each variant: its last distance, and how many times fewer steps and hours than the control's it took to X."""
    theirs = curves.get(control, ())
    rows = []
    for name, own in curves.items():
        last = [float(curve.values[-1]) for curve in own if curve is not None]
        pairs = [(a, b) for a, b in zip(own, theirs, strict=False) if a is not None and b is not None]
        if not last:
            continue
        cells = [_estimate(last, ".4g")]
        for against in ("steps", "hours"):
            ours, controls = (
                [_steps_to(pair[side], against, float(pair[1].values[-1])) for pair in pairs] for side in (0, 1)
            )
            cells.append(_speed_up(ours, controls))
        rows.append((name, cells))
    return rows


def _steps_to(curve: LearningCurve, against: str, distance: float) -> Reached | None:
    """When a curve reached a distance, in its ``steps`` or ``hours``."""
    return epochs_to(getattr(curve, against).tolist(), curve.values.tolist(), distance)


def _speed_up(ours: Sequence[Reached | None], theirs: Sequence[Reached | None]) -> str:
    """In words: the ratio over seeds, or of how many seeds X was not reached."""
    if not ours:
        return ABSENT
    missed = sum(reached is None for reached in ours)
    if missed:
        return "not reached" if len(ours) == 1 else f"not reached with {missed} of {len(ours)} seeds"
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    ratios = [b.epochs / a.epochs for a, b in both if a.epochs > 0]
    if not ratios or not np.isfinite(ratios).all():
        return ABSENT
    at_least = "at least " if any(a.at_first and a.epochs < b.epochs for a, b in both) else ""
    return f"{at_least}{_estimate(ratios, '.2f')}"


def _estimate(values: Sequence[float], form: str) -> str:
    interval = interval_over_runs(values)
    bounds = "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
    return f"{fmean(values):{form}}{bounds}"


def _chart(
    curves: Mapping[str, Sequence[LearningCurve | None]],
    colours: Mapping[str, int],
    against: str,
    label: str,
    number: int,
) -> Markup | None:
    series, intervals = {}, {}
    for name, own in curves.items():
        found = mean_curve(own, against)
        if found is not None and np.isfinite(found[0]).all():
            series[name] = found[:2]
            if found[2] is not None:
                intervals[name] = found[2]
    if not series:
        return None
    ends = "; ".join(f"{name} ends at {values[-1]:.4g}" for name, (_, values) in series.items())
    said = html.escape(f"{label} over {against}: {ends}", quote=True)
    return Markup(line_chart(series, colours, f"learning-{number}", said, intervals, against))
