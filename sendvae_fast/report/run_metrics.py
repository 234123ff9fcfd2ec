"""One table of all metrics: rows metrics, columns runs and the paper's rows, with what cannot be compared and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from string import ascii_lowercase

from sendvae_fast.evaluation.result import Result
from sendvae_fast.report.contents import RunRecord
from sendvae_fast.report.metric_names import Metric, metric_of, order_of
from sendvae_fast.report.paper import (
    AUTOENCODERS,
    PaperValue,
    guidance_of,
    paper_metric,
    paper_value,
    why_not_beside_the_paper,
)

Key = tuple[str, str, float | None]
"""Metric, protocol, guidance: a row."""


@dataclass(frozen=True)
class RunCell:
    """A run's value."""

    value: str
    interval: str = ""
    basis: str = ""
    """Counts of pictures, and the step of the weights."""
    marks: tuple[str, ...] = ()
    """Letters of the reasons why it cannot be compared."""


@dataclass(frozen=True)
class RunMetricRow:
    """A metric."""

    label: str
    direction: str
    meaning: str
    protocol: str
    said: str
    """What intervals say of the difference of runs."""
    cells: list[RunCell | None]
    """One per run, None where it was not measured."""
    paper: list[PaperValue | None]
    """One per autoencoder of the paper."""


@dataclass
class RunMetrics:
    """The table."""

    rows: list[RunMetricRow]
    paper: tuple[str, ...]
    """The paper's autoencoders that have a value anywhere."""
    reasons: dict[str, str] = field(default_factory=dict)
    """By letter."""


def run_metrics(runs: Sequence[RunRecord]) -> RunMetrics:
    """The table of what runs have measured. Where a run has measured one thing several times, the last one stands."""
    measured = [newest(run.results) for run in runs]
    keys = sorted(
        {key for results in measured for key in results}, key=lambda key: (order_of(key[0]), key[1], key[2] or 0)
    )
    letters: dict[str, str] = {}
    rows, papers = [], []
    for key in keys:
        results = [results.get(key) for results in measured]
        shown = next(result for result in results if result is not None)
        paper = [paper_value(name, shown, runs) for name in AUTOENCODERS]
        differences = _differences([run.name for run in runs], results)
        cells = [
            None if result is None else _cell(result, [*_beside_paper(result, paper), *reasons], letters)
            for result, reasons in zip(results, differences, strict=True)
        ]
        metric = metric_of(key[0])
        rows.append(
            RunMetricRow(
                label=metric.label + guidance_words(key[2]),
                direction={"higher": "↑", "lower": "↓", None: ""}[metric.better],
                meaning=metric.meaning,
                protocol=". ".join([key[1], *shown.remarks]),
                said=what_intervals_say([run.name for run in runs], results, any(differences)),
                cells=cells,
                paper=paper,
            )
        )
        papers.append(paper)
    kept = [index for index in range(len(AUTOENCODERS)) if any(paper[index] for paper in papers)]
    for row in rows:
        row.paper[:] = [row.paper[index] for index in kept]
    return RunMetrics(
        rows, tuple(AUTOENCODERS[index] for index in kept), {letter: words for words, letter in letters.items()}
    )


def newest(results: Sequence[Result]) -> dict[Key, Result]:
    """By row the result that stands: the last one, of training only where there is none of `sendvae evaluate`."""
    found: dict[Key, Result] = {}
    for result in sorted(results, key=lambda result: not result.while_training):
        found[result.metric, result.protocol, guidance_of(result)] = result
    return found


def what_intervals_say(names: Sequence[str], results: Sequence[Result | None], differ: bool = False) -> str:
    """Whether the 95 % intervals of runs overlap; nothing of a single run, or of a metric that has no better side.

    Args:
        names: of the runs.
        results: of a metric, one per run.
        differ: whether they were measured in different ways.
    """
    known = [(name, result) for name, result in zip(names, results, strict=True) if result is not None]
    if len(known) < 2 or metric_of(known[0][1].metric).better is None:
        return ""
    if differ:
        return "measured in different ways: not to be compared"
    if any(result.interval is None for _, result in known):
        return "without intervals: the difference may be chance"
    pairs = list(combinations(known, 2))
    overlapping = [(ours, theirs) for (ours, a), (theirs, b) in pairs if _overlap(a, b)]
    if len(overlapping) == len(pairs):
        return "the intervals overlap: no difference is shown" if len(pairs) == 1 else "all intervals overlap"
    if not overlapping:
        return "the intervals do not overlap" if len(pairs) == 1 else "no two intervals overlap"
    return "intervals overlap of " + ", ".join(f"{ours} and {theirs}" for ours, theirs in overlapping)


def seeds_sentence(runs: Sequence[RunRecord]) -> str:
    """How many seeds stand behind each configuration."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in ("run", "seed")}
        groups.setdefault(repr(settings), []).append(run.name)
    several = [names for names in groups.values() if len(names) > 1]
    if not several:
        return "One seed of each: intervals are over pictures, and another seed may turn any difference round."
    words = "; ".join(f"{', '.join(names)} are {len(names)} seeds of one configuration" for names in several)
    return f"{words}." + (" The others have one seed each." if len(several) < len(groups) else "")


def _cell(result: Result, reasons: Sequence[str], letters: dict[str, str]) -> RunCell:
    metric = metric_of(result.metric)
    for reason in reasons:
        if reason not in letters:
            letters[reason] = _letter(len(letters))
    counts = ", ".join(f"{count:,} {what}" for what, count in result.counts.items())
    step = "" if result.step is None else f"step {result.step:,}"
    return RunCell(
        value=f"{result.value:.{metric.digits}f}",
        interval=_interval(result, metric),
        basis="; ".join(filter(None, (counts, step))),
        marks=tuple(sorted(letters[reason] for reason in reasons)),
    )


def _beside_paper(result: Result, paper: Sequence[PaperValue | None]) -> list[str]:
    if paper_metric(result.metric) is None or not any(paper):
        return []
    return [f"Not beside the paper: {reason}." for reason in why_not_beside_the_paper(result)]


def _differences(names: Sequence[str], results: Sequence[Result | None]) -> list[list[str]]:
    """For each run what was different when it was measured, as against the first one that was."""
    first = next((index for index, result in enumerate(results) if result is not None), 0)
    reasons: list[list[str]] = []
    for result in results:
        known = results[first]
        own: list[str] = []
        if result is not None and known is not None and result is not known:
            other, ways = _ways(result), _ways(known)
            own = [f"Not beside {names[first]}: other {what}." for what in ways if other[what] != ways[what]]
        reasons.append(own)
    return reasons


def _ways(result: Result) -> Mapping[str, object]:
    real = {role: origin for role, origin in result.pictures.items() if role != "samples"}
    samples = result.pictures.get("samples")
    drawn = {} if samples is None else {key: samples.settings.get(key) for key in ("sampler", "labels", "precision")}
    return {
        "weights of the feature network": None if result.features is None else result.features.sha256,
        "numbers of pictures": dict(result.counts),
        "real pictures": {role: origin.sha256 for role, origin in real.items()},
        "sizes of pictures": {origin.image_size for origin in result.pictures.values()},
        "sampling": drawn,
    }


def _overlap(a: Result, b: Result) -> bool:
    assert a.interval is not None and b.interval is not None
    return a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]


def _interval(result: Result, metric: Metric) -> str:
    if result.interval is None:
        return ""
    return f"[{result.interval[0]:.{metric.digits}f}, {result.interval[1]:.{metric.digits}f}]"


def guidance_words(guidance: float | None) -> str:
    """What is added to a metric's label of pictures drawn with a guidance."""
    return "" if guidance is None else ", without guidance" if guidance == 1 else f", guidance {guidance:g}"


def _letter(index: int) -> str:
    """a to z, then aa, ab."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + ascii_lowercase[index % 26]
