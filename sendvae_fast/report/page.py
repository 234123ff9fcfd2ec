"""The page: one HTML file that needs no network, no script and no other file."""

import base64
import html
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sendvae_fast.files import write_atomic
from sendvae_fast.report.charts import line_chart
from sendvae_fast.report.contents import METRICS, Measured, ReportData, RunRecord, Variant, seed_values
from sendvae_fast.report.summary import format_duration, median_throughput
from sendvae_fast.version import __version__

MAX_PICTURE_WIDTH_PX = 1600
THROUGHPUT = "img_per_s"
REFRESH_S = 20
"""Seconds after which a browser reloads an unfinished page."""
LONE_COLOUR = 2  # the first colours of the palette are the quiet ones, for baselines
CURVES = {
    "loss": "Total loss",
    "reconstruction": "Reconstruction loss",
    "velocity": "Velocity loss",
    "align": "Alignment, 1 − cosine",
    "psnr": "PSNR of the training pictures, dB",
    "lpips": "LPIPS",
    "kl": "KL divergence",
    "gan": "GAN loss of the autoencoder",
    "discriminator": "Discriminator loss",
    "grad_norm": "Gradient norm",
}
"""Names of known curves, in the order of the page; others follow under their own names."""
STAGES = {"autoencoder": "Stage 1: autoencoder", "generator": "Stage 2: generator"}


@dataclass(frozen=True)
class Cell:
    """A value of a table."""

    text: str
    spread: str = ""
    best: bool = False
    absent: bool = False
    fraction: float | None = None
    """Length of the bar behind it, 0 to 1."""


def build_report(data: ReportData) -> str:
    """The HTML of the page."""
    environment = Environment(
        loader=PackageLoader("sendvae_fast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = png_data_uri
    environment.filters["yaml"] = lambda value: yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
    return environment.get_template("report.html.j2").render(
        data=data,
        version=__version__,
        metrics=METRICS,
        metric_table=metric_table(data.variants, unfinished=bool(data.to_come)),
        refresh_s=REFRESH_S,
        attribute_table=attribute_table(data.variants),
        stages=training_stages(data.runs),
        throughput=throughput_table(data.runs),
        num_columns=len(data.variants),
    )


def write_report(path: str | os.PathLike[str], data: ReportData) -> Path:
    """Write the page to `path`, whole or not at all; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, build_report(data))
    return path


def metric_table(variants: Sequence[Variant], unfinished: bool = False) -> dict[str, list[Cell]]:
    """Cells by metric, one per variant, for the metrics that any variant has (LPIPS even without: it says why).

    unfinished: what a variant lacks is still to come.
    """
    keys = [key for key in METRICS if any(key in variant.metrics for variant in variants)]
    table = {}
    for key in keys:
        metric = METRICS[key]
        means = [_mean(variant.metrics.get(key)) for variant in variants]
        best = _best(means, metric.digits, metric.better)
        table[key] = [
            Cell("to come" if unfinished and key not in variant.metrics else metric.absent, absent=True)
            if mean is None
            else Cell(f"{mean:.{metric.digits}f}", _spread(variant.metrics[key], metric.digits), best=is_best)
            for variant, mean, is_best in zip(variants, means, best, strict=True)
        ]
    return table


def attribute_table(variants: Sequence[Variant]) -> dict[str, list[Cell]]:
    """Cells by attribute, one per variant; the attributes that are read best come first."""
    names = dict.fromkeys(name for variant in variants for name in variant.attribute_f1)
    rows = {name: [_mean(variant.attribute_f1.get(name)) for variant in variants] for name in names}
    table = {}
    for name, means in sorted(rows.items(), key=lambda row: -max((mean or 0) for mean in row[1])):
        best = _best(means, 3, "higher")
        table[name] = [
            Cell("–" if mean is None else f"{mean:.3f}", best=is_best, fraction=mean)
            for mean, is_best in zip(means, best, strict=True)
        ]
    return table


def training_stages(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """For each stage that has runs: its title, the legend (name, colour index), and charts (title, svg) by metric.

    A run's name has the same colour in every chart.
    """
    names = list(dict.fromkeys(run.name for run in runs))
    colours = {name: index for index, name in enumerate(names)} if len(names) > 1 else dict.fromkeys(names, LONE_COLOUR)
    stages = []
    for stage, title in STAGES.items():
        own_runs = [run for run in runs if run.stage == stage]
        curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
        for run in own_runs:
            for name, points in run.series.items():
                curves[name][run.name] = points
        known = [name for name in (*CURVES, *sorted(curves.keys() - CURVES.keys())) if name in curves]
        titles = {name: CURVES.get(name, name) for name in known if name != THROUGHPUT}
        charts = [
            {"title": title, "svg": _chart(curves[name], colours, f"{stage}-{name}", title)}
            for name, title in titles.items()
        ]
        if own_runs:
            legend = [(run.name, colours[run.name]) for run in own_runs]
            rates = curves.get(THROUGHPUT)
            rate_svg = _chart(rates, colours, f"{stage}-rate", "Images per second") if rates else None
            stages.append({"title": title, "legend": legend, "charts": charts, "rate_svg": rate_svg})
    return stages


def throughput_table(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Steps, median rate and logged time of each run."""
    rows = []
    for run in runs:
        rate = median_throughput(run)
        rows.append(
            {
                "name": run.name,
                "stage": run.stage,
                "steps": f"{run.last_step:,}",
                "rate": "–" if rate is None else f"{rate:,.1f}",
                "time": format_duration(run.duration_s),
            }
        )
    return rows


def png_data_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data: URI; scaled down where it is wider than any screen needs."""
    picture = Image.fromarray(image)
    if picture.width > MAX_PICTURE_WIDTH_PX:
        height = round(picture.height * MAX_PICTURE_WIDTH_PX / picture.width)
        picture = picture.resize((MAX_PICTURE_WIDTH_PX, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _chart(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]], colours: Mapping[str, int], chart_id: str, title: str
) -> Markup:
    ends = "; ".join(f"{name} ends at {values[-1]:.4g}" for name, (_, values) in series.items())
    return Markup(line_chart(series, colours, chart_id, html.escape(f"{title} over steps: {ends}", quote=True)))


def _mean(measured: Measured) -> float | None:
    values = seed_values(measured)
    return fmean(values) if values else None


def _spread(measured: Measured, digits: int) -> str:
    """The standard deviation over seeds, where there are several."""
    values = seed_values(measured)
    return f"± {stdev(values):.{digits}f}" if len(values) > 1 else ""


def _best(means: Sequence[float | None], digits: int, better: str) -> list[bool]:
    """Which of the means are best as printed; none unless at least two are there and they differ."""
    printed = [None if mean is None else round(mean, digits) for mean in means]
    there = [value for value in printed if value is not None]
    if len(set(there)) < 2:
        return [False] * len(printed)
    best = max(there) if better == "higher" else min(there)
    return [value == best for value in printed]
