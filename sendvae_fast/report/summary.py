"""Plain sentences and headline numbers from results: what was measured, and no verdict."""

import datetime
from collections.abc import Sequence
from statistics import fmean

from sendvae_fast.evaluation.result import Result
from sendvae_fast.report.contents import RunRecord, Tile, Variant
from sendvae_fast.report.metric_names import family_of, metric_of

HEADLINE_METRICS = 4
"""Tiles of a comparison at most."""
FIRST = ("fid", "frechet", "decoded_frechet", "attribute_f1", "psnr", "rfid", "rfrechet")
"""The families of metrics that get tiles before others do."""


def comparison_headline(variants: Sequence[Variant]) -> str:
    """How many variants and seeds are compared."""
    num_seeds = max((len(variant.seeds) for variant in variants), default=0)
    if num_seeds <= 1:
        return f"{len(variants)} variants, one seed each: other seeds may turn a difference round."
    return f"{len(variants)} variants, {num_seeds} seeds each."


def comparison_sentences(candidate: Variant, control: Variant) -> list[str]:
    """One sentence per metric that both have: the numbers, and what seeds or intervals say of their difference."""
    return [
        _sentence(name, candidate, control)
        for name in candidate.metrics
        if name in control.metrics and metric_of(name).better is not None
    ]


def comparison_tiles(candidate: Variant, control: Variant) -> list[Tile]:
    """Numbers of the candidate beside the control's."""
    tiles, names = [], [name for name in candidate.metrics if name in control.metrics]
    names.sort(key=lambda name: FIRST.index(family) if (family := family_of(name)) in FIRST else len(FIRST))
    for name in names[:HEADLINE_METRICS]:
        metric = metric_of(name)
        ours, theirs = (mean_value(variant.metrics[name]) for variant in (candidate, control))
        tiles.append(
            Tile(
                label=f"{metric.label}: {candidate.name}",
                value=f"{ours:.{metric.digits}f}",
                detail=f"{control.name}: {theirs:.{metric.digits}f}",
            )
        )
    return tiles


def mean_value(results: Sequence[Result]) -> float:
    """Of one result per seed."""
    return fmean(result.value for result in results)


def run_sentences(run: RunRecord) -> list[str]:
    """The changes of a run's curves from its first logged values to its last."""
    sentences = []
    for name, label in (
        ("reconstruction", "reconstruction loss"),
        ("velocity", "velocity loss"),
        ("align", "alignment loss"),
        ("loss", "total loss"),
    ):
        if name in run.series and len(run.series[name][1]) > 1:
            _, values = run.series[name]
            word = "fell" if values[-1] < values[0] else "rose" if values[-1] > values[0] else "stayed"
            sentences.append(f"The {label} {word} from {values[0]:.4g} to {values[-1]:.4g}.")
    return [" ".join(sentences)] if sentences else []


def run_tiles(run: RunRecord) -> list[Tile]:
    """Headline numbers of one run."""
    tiles = [Tile(label="Steps", value=f"{run.last_step:,}")]
    if len(run.series.get("loss", ((), ()))[1]):
        tiles.append(Tile(label="Last logged loss", value=f"{run.series['loss'][1][-1]:.4g}"))
    rate = median_throughput(run)
    if rate is not None:
        tiles.append(Tile(label="Throughput", value=f"{rate:,.1f}", detail="images a second, median"))
    if run.duration_s > 0:
        tiles.append(Tile(label="Logged time", value=format_duration(run.duration_s), detail="first to last line"))
    return tiles


def median_throughput(run: RunRecord) -> float | None:
    """Images per second, the median of what was logged; None if nothing was."""
    values = sorted(run.series.get("img_per_s", ((), ()))[1])
    return float(values[len(values) // 2]) if values else None


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    text = str(datetime.timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0")


def _sentence(name: str, candidate: Variant, control: Variant) -> str:
    metric, ours, theirs = metric_of(name), candidate.metrics[name], control.metrics[name]
    numbers = (
        f"{metric.label}: {mean_value(ours):.{metric.digits}f} for {candidate.name}, "
        f"{mean_value(theirs):.{metric.digits}f} for {control.name}"
    )
    if len(ours) == len(theirs) > 1:
        higher = sum(a.value > b.value for a, b in zip(ours, theirs, strict=True))
        return f"{numbers}; higher in {higher} of {len(ours)} seeds."
    if len(ours) == len(theirs) == 1 and ours[0].interval and theirs[0].interval:
        (low, high), (other_low, other_high) = ours[0].interval, theirs[0].interval
        overlap = low <= other_high and other_low <= high
        return f"{numbers}; their 95 % intervals {'overlap' if overlap else 'do not overlap'}."
    return f"{numbers}."
