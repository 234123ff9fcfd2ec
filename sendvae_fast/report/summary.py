"""Plain sentences and headline numbers from results, good or bad."""

import datetime
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from sendvae_fast.report.contents import METRICS, RunRecord, Tile, Variant, seed_values

Outcome = Literal["better", "worse", "unclear", "absent"]
# The paper's claims about alignment, which a verdict weighs, and its words for each outcome.
CLAIMED = {
    "attribute_f1": {
        "better": "latents tell attributes better",
        "worse": "latents tell attributes worse",
        "unclear": "latents tell attributes about as well",
    },
    "gfid": {
        "better": "generated pictures are closer to real ones",
        "worse": "generated pictures are farther from real ones",
        "unclear": "generated pictures are about as close to real ones",
    },
}


def compare(key: str, candidate: Variant, control: Variant) -> tuple[Outcome, list[float]]:
    """The outcome of a metric and its paired differences candidate - control, seed by seed.

    `better` and `worse` only where every seed says so; an equal value or seeds that disagree are `unclear`. Numbers of
    seeds that differ are compared by their means.
    """
    ours, theirs = seed_values(candidate.metrics.get(key)), seed_values(control.metrics.get(key))
    if not ours or not theirs:
        return "absent", []
    if len(ours) != len(theirs):
        ours, theirs = [fmean(ours)], [fmean(theirs)]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    sign = 1 if METRICS[key].better == "higher" else -1
    if all(sign * difference > 0 for difference in differences):
        return "better", differences
    if all(sign * difference < 0 for difference in differences):
        return "worse", differences
    return "unclear", differences


def verdict(candidate: Variant, control: Variant) -> str:
    """One sentence on whether the candidate beat the control where the paper says it should."""
    outcomes = {key: compare(key, candidate, control)[0] for key in CLAIMED}
    clauses = [CLAIMED[key][outcome] for key, outcome in outcomes.items() if outcome != "absent"]
    if not clauses:
        return f"Neither attributes nor generation were measured for both {candidate.name} and {control.name}."
    return f"Compared with {control.name}, {candidate.name}'s {' and its '.join(clauses)}."


def comparison_sentences(candidate: Variant, control: Variant) -> list[str]:
    """One sentence per metric that both have, the claimed ones first, and a remark on their reliability."""
    sentences, num_seeds = [], 0
    for key in (*CLAIMED, *(key for key in METRICS if key not in CLAIMED)):
        outcome, differences = compare(key, candidate, control)
        if outcome != "absent":
            num_seeds = max(num_seeds, len(differences))
            sentences.append(_sentence(key, outcome, differences, candidate, control))
    if num_seeds == 1:
        sentences.append("There is one seed: a difference may be no larger than another seed would make by itself.")
    return sentences


def comparison_tiles(candidate: Variant, control: Variant) -> list[Tile]:
    """Headline numbers of the candidate beside the control's."""
    tiles = []
    for key in ("attribute_f1", "gfid", "rfid", "psnr"):
        outcome, _ = compare(key, candidate, control)
        if outcome != "absent":
            metric = METRICS[key]
            ours, theirs = (fmean(seed_values(variant.metrics[key])) for variant in (candidate, control))
            detail = f"{control.name}: {theirs:.{metric.digits}f} · {metric.better} is better"
            tiles.append(Tile(label=metric.label, value=f"{ours:.{metric.digits}f}", detail=detail))
    return tiles


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


def _sentence(key: str, outcome: Outcome, differences: Sequence[float], candidate: Variant, control: Variant) -> str:
    metric, num_seeds = METRICS[key], len(differences)
    ours, theirs = (fmean(seed_values(variant.metrics[key])) for variant in (candidate, control))
    numbers = f"was {ours:.{metric.digits}f} for {candidate.name} and {theirs:.{metric.digits}f} for {control.name}"
    if num_seeds == 1:
        judgement = {"better": "better", "worse": "worse", "unclear": "the same"}[outcome]
    elif outcome == "unclear":
        sign = 1 if metric.better == "higher" else -1
        agreeing = sum(sign * difference > 0 for difference in differences)
        judgement = f"no clear difference (better in {agreeing} of {num_seeds} seeds)"
    else:
        judgement = f"{outcome} in all {num_seeds} seeds"
    return f"{metric.subject} {numbers}: {judgement}."
