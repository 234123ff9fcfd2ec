"""`sendvae evaluate correlation`: which measures of an autoencoder go with how well it generates (Fig. 1 and 2)."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import RESULTS_FILE, read_results
from sendvae_fast.files import staged_output
from sendvae_fast.reading import read_text, reading

PAPER_TABLE = Path(__file__).parent / "latent_space" / "paper_autoencoders.csv"
"""What the paper prints of its four autoencoders."""
LEAST_AUTOENCODERS = 3
"""With a metric, for it to have a correlation: two points are always on a line."""

Table = dict[str, dict[str, float]]
"""By autoencoder: values by metric."""


@dataclass(kw_only=True)
class CorrelationConfig:
    """Where values come from, and the figure. Raises `UserError` for a value out of range."""

    table: str | None = None
    """CSV: a heading `autoencoder,<metric>,...`, then a line each, empty where there is no value; # begins a comment.
    Without table and runs: what the paper prints."""
    runs: tuple[str, ...] = ()
    """Runs or results files of `sendvae evaluate`, one per autoencoder, for their newest values; with a table, too."""
    target: str = "gfid"
    """The metric that the others are compared with."""
    out: str = "correlation.png"
    """The figure: png, svg or pdf."""

    def __post_init__(self) -> None:
        checks.paths(self, "out")
        if Path(self.out).suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"out is {self.out}: the figure's name must end in .png, .svg or .pdf")


class Correlation(NamedTuple):
    """Of one metric with the target."""

    pearson: float
    interval: tuple[float, float] | None
    """95 % by Fisher's z; None of three autoencoders, which have none."""
    points: dict[str, tuple[float, float]]
    """(metric, target) by autoencoder."""


def evaluate_correlation(config: CorrelationConfig, say: Callable[[str], object] = print) -> dict[str, Correlation]:
    """Say each metric's correlation, strongest first, and draw the figure.

    Raises:
        UserError: a file is missing or broken, the target is not in it, or there are too few autoencoders.
    """
    table = read_table(Path(config.table)) if config.table is not None else {}
    for where in config.runs:
        name, values = _of_run(Path(where))
        if name in table:
            raise UserError(f"there are two autoencoders {name!r}: give each a name of its own")
        table[name] = values
    if not table:
        table = read_table(PAPER_TABLE)
    found = correlations(table, config.target)
    for metric, one in found.items():
        interval = "" if one.interval is None else " [{:.3f}, {:.3f}]".format(*one.interval)
        say(f"{metric:28s} Pearson {one.pearson:+.4f}{interval}  {len(one.points)} autoencoders, with {config.target}")
    draw(found, config.target, config.out)
    say(f"drawn: {config.out}")
    return found


def read_table(path: Path) -> Table:
    """Values by autoencoder and metric. Raises UserError where the file is not as `CorrelationConfig` says."""
    with reading(path, "give the path of a CSV file"):
        lines = [line for line in read_text(path).splitlines() if line and not line.startswith("#")]
        rows = list(csv.reader(lines))
    if not rows or rows[0][:1] != ["autoencoder"] or len(rows[0]) < 3:
        raise UserError(f"{path} must begin with a line 'autoencoder,<metric>,<metric>,...'; correct it")
    table: Table = {}
    for row in rows[1:]:
        if len(row) != len(rows[0]) or row[0] in table:
            raise UserError(f"{path}: the line of {row[0]!r} must be its only one, with {len(rows[0]) - 1} values")
        try:
            table[row[0]] = {
                name: float(value) for name, value in zip(rows[0][1:], row[1:], strict=True) if value.strip()
            }
        except ValueError as error:
            raise UserError(f"{path}: a value of {row[0]!r} is no number ({error}); correct or empty it") from None
        if not all(map(math.isfinite, table[row[0]].values())):
            raise UserError(f"{path}: a value of {row[0]!r} is not finite; correct or empty it")
    return table


def correlations(table: Mapping[str, Mapping[str, float]], target: str) -> dict[str, Correlation]:
    """Each metric's Pearson correlation with the target, strongest first, over the autoencoders that have both.

    Metrics that fewer than `LEAST_AUTOENCODERS` have, or that are the same for all, are left out, as are the target's
    other kinds (names that begin with it).

    Raises:
        UserError: nothing is left, or nothing has the target.
    """
    from scipy.stats import pearsonr

    metrics = dict.fromkeys(name for values in table.values() for name in values)
    if target not in metrics:
        raise UserError(f"no autoencoder has a value of {target}; --target may be {', '.join(metrics)}")
    found = {}
    family = target.split("_", maxsplit=1)[0]
    for metric in (name for name in metrics if name.split("_")[0] != family):
        points = {
            name: (values[metric], values[target])
            for name, values in table.items()
            if metric in values and target in values
        }
        if len(points) < LEAST_AUTOENCODERS or any(len(set(axis)) == 1 for axis in zip(*points.values(), strict=True)):
            continue
        result: Any = pearsonr(*zip(*points.values(), strict=True))
        fisher = result.confidence_interval() if len(points) > 3 else None
        interval = None if fisher is None else (float(fisher.low), float(fisher.high))
        found[metric] = Correlation(float(result.statistic), interval, points)
    if not found:
        raise UserError(
            f"no metric has values beside {target} for {LEAST_AUTOENCODERS} autoencoders or more; give more of them"
        )
    return dict(sorted(found.items(), key=lambda item: -abs(item[1].pearson)))


def draw(found: Mapping[str, Correlation], target: str, path: str) -> None:
    """A panel per metric: a point per autoencoder, the least-squares line, the correlation with its interval."""
    import numpy as np
    from matplotlib.figure import Figure

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (metric, one) in zip(panels, found.items(), strict=False):
        x, y = (np.array(axis) for axis in zip(*one.points.values(), strict=True))
        slope, start = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        panel.plot(ends, start + slope * ends, color="#999999", linewidth=1, zorder=1)
        panel.scatter(x, y, s=28, color="#2a6f97", zorder=2)
        for name, point in one.points.items():
            side = "right" if point[0] > ends.mean() else "left"
            place = (4 if side == "left" else -4, 5)
            panel.annotate(name, point, xytext=place, textcoords="offset points", fontsize=7, ha=side)
        interval = "" if one.interval is None else ", 95 % [{:.2f}, {:.2f}]".format(*one.interval)
        panel.set_title(f"{metric}: r = {one.pearson:.3f}{interval}", fontsize=8)
        panel.set_xlabel(metric, fontsize=8)
        panel.set_ylabel(target, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.margins(0.18)
    for panel in panels[len(found) :]:
        panel.set_visible(False)
    with staged_output(path) as unfinished:
        figure.savefig(unfinished, format=Path(path).suffix[1:], dpi=160)


def _of_run(where: Path) -> tuple[str, dict[str, float]]:
    """A run's name and its newest values by metric."""
    file = where / RESULTS_FILE if where.is_dir() else where
    results = read_results(file)
    if not results:
        raise UserError(f"{where} has no results; run `sendvae evaluate` on it first")
    return where.stem if where.is_file() else where.name, {result.metric: result.value for result in results}
