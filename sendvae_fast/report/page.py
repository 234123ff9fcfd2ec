"""The page: one HTML file that needs no network, no script and no other file."""

import base64
import html
import io
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sendvae_fast.evaluation.intervals import interval_over_runs
from sendvae_fast.evaluation.result import Result
from sendvae_fast.files import write_atomic
from sendvae_fast.reading import reading
from sendvae_fast.report.charts import line_chart
from sendvae_fast.report.contents import ReportData, RunRecord, Variant
from sendvae_fast.report.latent_spaces import latent_section
from sendvae_fast.report.learning import learning
from sendvae_fast.report.metric_names import metric_of, order_of
from sendvae_fast.report.paper import guidance_of
from sendvae_fast.report.run_facts import differing_settings, epochs_to_fid, facts
from sendvae_fast.report.run_metrics import guidance_words, run_metrics, seeds_sentence
from sendvae_fast.report.summary import format_duration, mean_value, median_throughput
from sendvae_fast.version import __version__

MAX_PICTURE_WIDTH_PX = 4096
"""Wider pictures are scaled down: no preview of training is."""
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
MAX_CURVES = 60
"""Curves of a stage that the page shows."""
STAGES = {"autoencoder": "Stage 1: autoencoder", "generator": "Stage 2: generator"}


@dataclass(frozen=True)
class Cell:
    """A value of a table."""

    text: str
    spread: str = ""
    difference: str = ""
    """From the control, where there are several seeds."""
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
    generators = [run for run in data.runs if run.stage == "generator"]
    environment.filters["png"] = png_data_uri
    environment.filters["breakable"] = breakable
    environment.filters["yaml"] = lambda value: yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
    return environment.get_template("report.html.j2").render(
        data=data,
        version=__version__,
        metric_table=metric_table(data.variants, unfinished=bool(data.to_come), control=data.control),
        learning=learning(data.variants, data.control),
        run_names=named(data.runs, data.runs),
        facts=[] if data.variants else facts(data.runs),
        settings=[] if data.variants else settings_tables(data.runs),
        run_metrics=None if data.variants else run_metrics(data.runs),
        seeds=seeds_sentence(data.runs) if len(data.runs) > 1 and not data.variants else "",
        epochs_to_fid=None if data.variants else epochs_to_fid(generators),
        generators=named(generators, data.runs),
        refresh_s=REFRESH_S,
        latent_section=latent_section(data.latent_views),
        attribute_table=attribute_table(data.variants),
        stages=training_stages(data.runs, [variant.name for variant in data.variants]),
        throughput=throughput_table(data.runs),
        num_columns=len(data.variants),
    )


def breakable(key: str) -> Markup:
    """A dotted key that may go on in the next line after a dot or an underscore, and nowhere else."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", html.escape(key)))


def write_report(path: str | os.PathLike[str], data: ReportData) -> Path:
    """Write the page to `path`, whole or not at all; returns the path."""
    path = Path(path)
    with reading(path.parent, "make the run again, or repair what is in it"):
        page = build_report(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode("utf-8", "replace").decode("utf-8"))  # JSON can hold halves of characters
    return path


@dataclass(frozen=True)
class MetricRow:
    """A row of the comparison's table."""

    label: str
    direction: str
    meaning: str
    protocol: str
    """Protocol and counts of pictures, and what else a reader must know."""
    cells: list[Cell]

    @property
    def has_differences(self) -> bool:
        """Whether a cell says how far it is from the control."""
        return any(cell.difference for cell in self.cells)


def metric_table(variants: Sequence[Variant], unfinished: bool = False, control: str = "") -> list[MetricRow]:
    """A row for each metric that any variant has, with a cell per variant.

    Args:
        variants: the columns.
        unfinished: what a variant lacks is still to come.
        control: name of the variant that differences are from, where there are several seeds.
    """
    absent = Cell("to come" if unfinished else "not measured", absent=True)
    beside = next((variant for variant in variants if variant.name == control), None)
    rows = []
    for name in sorted({name for variant in variants for name in variant.metrics}, key=order_of):
        metric = metric_of(name)
        measured = [variant.metrics.get(name, []) for variant in variants]
        most = max(map(len, measured))
        cells = [
            Cell(
                f"{mean_value(results):.{metric.digits}f}",
                _spread(results, metric.digits, most),
                "" if beside in (None, variant) else _difference(variant, beside, name, metric.digits),
            )
            if results
            else absent
            for variant, results in zip(variants, measured, strict=True)
        ]
        shown = next(results[-1] for results in measured if results)
        rows.append(MetricRow(metric.label, _direction(metric.better), metric.meaning, basis(shown), cells))
    return rows


def basis(result: Result) -> str:
    """How a number was measured: protocol, counts, remarks."""
    counts = ", ".join(f"{count:,} {what}" for what, count in result.counts.items())
    return ". ".join([f"{result.protocol}; {counts}", *result.remarks])


def attribute_table(variants: Sequence[Variant]) -> dict[str, list[Cell]]:
    """Cells by attribute, one per variant; the attributes that are read best come first."""
    names = dict.fromkeys(name for variant in variants for name in variant.attribute_f1)
    rows = {
        name: [fmean(values) if (values := variant.attribute_f1.get(name)) else None for variant in variants]
        for name in names
    }
    return {
        name: [Cell("–" if mean is None else f"{mean:.3f}", fraction=mean) for mean in means]
        for name, means in sorted(rows.items(), key=lambda row: -max((mean or 0) for mean in row[1]))
    }


def training_stages(runs: Sequence[RunRecord], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """For each stage that has runs: its title, the legend (name, colour index), and charts (title, svg) by metric.

    A run's name has the same colour in every chart; names: all that there will be, in the order of colours.
    """
    colours = {name: index for index, name in enumerate(names)} if len(names) > 1 else colours_of(runs)
    stages = []
    for stage, title in STAGES.items():
        own_runs = [run for run in runs if run.stage == stage]
        curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
        for run in own_runs:
            for name, points in run.series.items():
                curves[name][run.name] = points
        known = [name for name in (*CURVES, *sorted(curves.keys() - CURVES.keys())) if name in curves]
        titles = {name: CURVES.get(name, name) for name in known if name != THROUGHPUT}
        charts = [  # numbered, because a name in a log may be anything, and ids of the page may not
            {"title": title, "svg": _chart(curves[name], colours, f"{stage}-{number}", title)}
            for number, (name, title) in enumerate(list(titles.items())[:MAX_CURVES])
        ]
        measured = measured_charts(own_runs, colours, f"{stage}-measured")
        if own_runs:
            legend = [(run.name, colours[run.name]) for run in own_runs]
            rates = curves.get(THROUGHPUT)
            rate_svg = _chart(rates, colours, f"{stage}-rate", "Images per second") if rates else None
            stages.append(
                {"title": title, "legend": legend, "charts": charts, "measured": measured, "rate_svg": rate_svg}
            )
    return stages


def colours_of(runs: Sequence[RunRecord]) -> dict[str, int]:
    """Index of each name's colour, the same wherever the name stands."""
    names = list(dict.fromkeys(run.name for run in runs))
    return {name: index for index, name in enumerate(names)} if len(names) > 1 else dict.fromkeys(names, LONE_COLOUR)


def named(runs: Sequence[RunRecord], all_runs: Sequence[RunRecord]) -> list[tuple[str, int]]:
    """Name and colour index of some of the runs of a page."""
    return [(run.name, colours_of(all_runs)[run.name]) for run in runs]


def settings_tables(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """For each stage with several runs: its title, its runs and the settings in which they differ."""
    tables = []
    for stage, title in STAGES.items():
        own_runs = [run for run in runs if run.stage == stage]
        if rows := differing_settings(own_runs):
            tables.append({"title": title, "names": named(own_runs, runs), "rows": rows})
    return tables


def measured_charts(runs: Sequence[RunRecord], colours: Mapping[str, int], chart_id: str) -> list[dict[str, Any]]:
    """A chart (title, svg) for each metric that runs have measured as they trained, with intervals where there are."""
    found: dict[tuple[str, str, float | None], dict[str, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for result in run.results:
            if result.while_training and result.step is not None:
                found[result.metric, result.protocol, guidance_of(result)][run.name][result.step] = result
    charts = []
    for number, (key, by_run) in enumerate(sorted(found.items(), key=lambda item: order_of(item[0][0]))[:MAX_CURVES]):
        series, intervals = {}, {}
        for name, by_step in by_run.items():
            results = [by_step[step] for step in sorted(by_step)]
            series[name] = np.array(sorted(by_step)), np.array([result.value for result in results])
            bounds = [result.interval for result in results if result.interval is not None]
            if len(bounds) == len(results):
                low, high = np.array(bounds).T
                intervals[name] = low, high
        title = metric_of(key[0]).label + guidance_words(key[2])
        charts.append({"title": title, "svg": _chart(series, colours, f"{chart_id}-{number}", title, intervals)})
    return charts


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
    """uint8 [H, W, 3] as a data: URI; scaled down where it is wider than `MAX_PICTURE_WIDTH_PX`."""
    picture = Image.fromarray(image)
    if picture.width > MAX_PICTURE_WIDTH_PX:
        height = round(picture.height * MAX_PICTURE_WIDTH_PX / picture.width)
        picture = picture.resize((MAX_PICTURE_WIDTH_PX, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _chart(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    colours: Mapping[str, int],
    chart_id: str,
    title: str,
    intervals: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> Markup:
    ends = "; ".join(f"{name} ends at {values[-1]:.4g}" for name, (_, values) in series.items())
    label = html.escape(f"{title} over steps: {ends}", quote=True)
    return Markup(line_chart(series, colours, chart_id, label, intervals))


def _spread(results: Sequence[Result], digits: int, most: int) -> str:
    """The 95 % interval over seeds, where there are several; of a single one its own, if it has one."""
    values = [result.value for result in results]
    interval = results[0].interval if len(results) == 1 else interval_over_runs(values)
    words = [] if interval is None else [f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"]
    return ", ".join([*words, *([f"{len(results)} of {most} seeds"] if len(results) < most else [])])


def _difference(variant: Variant, control: Variant, metric: str, digits: int) -> str:
    """The mean over seeds of the difference from the control, with its 95 % interval; nothing of a single seed."""
    pairs = variant.differences_from(control, metric)
    interval = interval_over_runs(pairs)
    if interval is None:
        return ""
    # Where columns are narrow the line breaks before the interval, not in it.
    return f"{fmean(pairs):+.{digits}f} [{interval[0]:+.{digits}f},\N{NO-BREAK SPACE}{interval[1]:+.{digits}f}]"


def _direction(better: str | None) -> str:
    return {"higher": "↑", "lower": "↓", None: ""}[better]
