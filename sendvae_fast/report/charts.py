"""Line charts as inline SVG that takes its colours and its font from the page, so that it follows light and dark."""

import functools
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

MAX_POINTS = 300
NUM_COLOURS = 6
# matplotlib knows no CSS variables: draw in colours that stand for them, and name the variables afterwards.
_INK, _RULE = "#010101", "#020202"
_SERIES = [f"#0300{index:02d}" for index in range(NUM_COLOURS)]
_VARIABLES = {_INK: "var(--soft)", _RULE: "var(--rule)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 8.5,
    "axes.edgecolor": _RULE,
    "axes.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
}
LOG_SCALE_RATIO = 50
STEP = "step"


def line_chart(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    colours: Mapping[str, int],
    chart_id: str,
    label: str,
    intervals: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    against: str = STEP,
) -> str:
    """An `<svg>` with one line per entry. The y axis is logarithmic where positive values span `LOG_SCALE_RATIO`.

    Args:
        series: (steps [n], values [n]) by name.
        colours: index of each entry's CSS variable `--series-<index>`.
        chart_id: unique in the page.
        label: for readers who do not see it.
        intervals: (lowest [n], highest [n]) by name: measured points, each with a band around it.
        against: what the first of the two is, if not steps.
    """
    lines = []
    for name, points in series.items():
        steps, values = map(_numbers, thin(*points))
        bounds = None
        if intervals is not None and name in intervals:
            low, high = intervals[name]
            bounds = _numbers(thin(points[0], low)[1]), _numbers(thin(points[0], high)[1])
        lines.append(_Line(steps, values, bounds, colours[name] % NUM_COLOURS))
    everything = np.concatenate([values for _, values in series.values()])
    is_logarithmic = bool(everything.min() > 0 and everything.max() > LOG_SCALE_RATIO * everything.min())
    return _inline(_drawn(tuple(lines), is_logarithmic, against), chart_id, label)


class _Line(NamedTuple):
    """A line of a chart as plain numbers."""

    steps: tuple[float, ...]
    values: tuple[float, ...]
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None
    """Lowest and highest."""
    colour: int


@functools.lru_cache(maxsize=512)
def _drawn(lines: tuple[_Line, ...], is_logarithmic: bool, against: str) -> str:
    """matplotlib's `<svg>` of lines, kept: a page that fills is written many times."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7, 2.15), layout="constrained")
        axes = figure.add_subplot()
        for steps, values, bounds, colour in lines:
            marker = "o" if len(steps) == 1 or bounds else ""
            (line,) = axes.plot(steps, values, color=_SERIES[colour], linewidth=1.5, marker=marker, markersize=4)
            line.set_solid_joinstyle("round")
            if bounds is not None:
                low, high = bounds
                axes.fill_between(steps, low, high, color=_SERIES[colour], alpha=0.18, linewidth=0)
        if is_logarithmic:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=against == STEP))
        if against == STEP:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(against)
        axes.grid(axis="y")
        axes.tick_params(length=0, which="both")
        axes.margins(x=0.02)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return text.getvalue()


def _numbers(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points, each the mean of a run of neighbours."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    groups: Sequence[np.ndarray] = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return np.array([steps[group].mean() for group in groups]), np.array([values[group].mean() for group in groups])


def _inline(svg: str, chart_id: str, label: str) -> str:
    """Strip what only a file of its own needs, and make ids, colours and fonts those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    for size in ("width", "height"):  # the page's width counts, and the viewBox keeps the proportions
        svg = re.sub(rf'(<svg[^>]*?)\s{size}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{chart_id}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{chart_id}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
