"""docs/evidence.md from the results: every number of it, the answers to the plan's hypotheses, what is still to run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.evidence.analysis import (
    MEASURES,
    Result,
    by_variant,
    correlation_with_distance,
    difference,
    mean_over_seeds,
    of_main_size,
    read_results,
    values_of,
)
from bench.evidence.hypotheses import answers
from bench.evidence.plots import PLOTS, draw_plots, file_name, names
from bench.evidence.study import RESULTS, read_points, read_variants_file
from bench.machine import ROOT
from bench.markdown import interval_text, line
from bench.table import with_tables

PAGE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"
SCALE = "cpu"
BEGIN = "<!-- {}, made by `python -m bench evidence --page`: begin -->"
END = "<!-- {}, made by `python -m bench evidence --page`: end -->"
OF_PICTURES = (
    "frechet", "frechet_guided", "floor", "from_decoded", "kid", "class_accuracy", "class_accuracy_guided",
    "nearer_to_train", "tuned", "tuned_noise",
)  # fmt: skip
OF_LATENTS = ("mean_of_gaussian", "latent_accuracy", "f1", "class_probe", "psnr")
EXPLAINING = ("kl", "mean_share", "effective_rank", "sensitivity", "cost_of_error")
CORRELATED = (
    "f1",
    "class_probe",
    "psnr",
    "floor",
    "kl",
    "mean_share",
    "effective_rank",
    "sensitivity",
    "mean_of_gaussian",
)


def write_page(results: Path = RESULTS, page: Path = PAGE, images: Path = IMAGES) -> None:
    """Rewrite what the page has from the results, and its plots."""
    found = read_results(results / SCALE)
    page.write_text(page_with(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    draw_plots(found, images, fingerprint(found))
    print("written:", page)


def page_with(text: str, results: Sequence[Result]) -> str:
    """The page's text with its sections made anew."""
    for name, section in sections(results).items():
        text = with_tables(text, section, BEGIN.format(name), END.format(name))
    return text


def sections(results: Sequence[Result]) -> dict[str, str]:
    """What the script writes, by the name of its place on the page."""
    variants = by_variant(results)
    plots = {name: f"![{PLOTS[name]}](images/{file_name(name)})\n" for name in names(results)}
    return {
        "answers": "".join(f"{number}. {text}\n" for number, text in enumerate(answers(results), start=1)),
        "curves": plots.get("curves", ""),
        "pictures": table(variants, OF_PICTURES),
        "differences": difference_table(variants, (*OF_PICTURES, *OF_LATENTS)),
        "forest": plots.get("differences", ""),
        "noise levels": plots.get("noise_levels", ""),
        "latents": table(variants, OF_LATENTS),
        "spectra": plots.get("latents", ""),
        "explaining": table(variants, EXPLAINING),
        "correlations": correlation_table(results),
        "f1": plots.get("f1", ""),
        "provenance": provenance(results),
        "missing": missing(results),
    }


def fingerprint(results: Sequence[Result]) -> str:
    """Tells the results that plots are of."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def table(variants: Mapping[str, Mapping[int, Result]], keys: Iterable[str]) -> str:
    """Means over seeds, a line for each variant."""
    measures = [MEASURES[key] for key in keys]
    rows = [line(("variant", "seeds", *(measure.title for measure in measures))), line(["---"] * (len(measures) + 2))]
    for variant in in_order(variants):
        cells = []
        for measure in measures:
            values = list(values_of(measure, variants[variant]).values())
            cells.append(interval_text(*mean_over_seeds(values)[:2], measure.digits) if values else "")
        rows.append(line((variant, str(len(variants[variant])), *cells)))
    return "\n".join(rows) + "\n"


def difference_table(variants: Mapping[str, Mapping[int, Result]], keys: Iterable[str]) -> str:
    """Mean differences from the control, seed by seed; bold where the interval leaves out 0."""
    measures = [MEASURES[key] for key in keys if key != "floor" and not key.startswith("tuned")]
    rows = [line(("variant - control", "seeds", *(measure.title for measure in measures)))]
    rows.append(line(["---"] * (len(measures) + 2)))
    for variant, control in pairs(variants):
        estimates = [difference(measure, variants[variant], variants[control]) for measure in measures]
        seeds = sorted(variants[variant].keys() & variants[control].keys())
        cells = [
            ""
            if estimate is None
            else bold(interval_text(estimate.value, estimate.interval, measure.digits, "+"), estimate.leaves_out_zero)
            for measure, estimate in zip(measures, estimates, strict=True)
        ]
        rows.append(line((f"{variant} - {control}", str(len(seeds)), *cells)))
    return "\n".join(rows) + "\n"


def bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def pairs(variants: Mapping[str, Mapping[int, Result]]) -> list[tuple[str, str]]:
    """Variants and their controls that share a seed, in the plan's order."""
    known = read_variants_file()
    found = [(key, known[key].control) for key in in_order(variants)]
    return [(key, control) for key, control in found
            if control is not None and variants[key].keys() & variants.get(control, {}).keys()]  # fmt: skip


def in_order(variants: Iterable[str]) -> list[str]:
    """As in the plan."""
    present = set(variants)
    return [key for key in read_variants_file() if key in present]


def correlation_table(results: Sequence[Result]) -> str:
    """Pearson of the autoencoders' measures with the distances, over points without REPA and of the main size."""
    usual = of_main_size(results)
    found, without_decoder = (
        correlation_with_distance(usual, CORRELATED, distance) for distance in ("frechet", "from_decoded")
    )
    rows = [line(("measure", "Pearson with the distance", "with that from decoded latents", "points"))]
    rows.append(line(["---"] * 4))
    for key, one in found.items():
        values = (interval_text(part.pearson, part.interval, 2, "+") for part in (one, without_decoder[key]))
        rows.append(line((MEASURES[key].title, *values, str(len(one.points)))))
    return "\n".join(rows) + "\n"


def provenance(results: Sequence[Result]) -> str:
    """Where and at which commits the points were run."""
    if not results:
        return "No point is done yet.\n"
    commits = sorted(
        {f"{result['commit'] or 'unknown'}"[:7] + ("" if result["clean"] else " with changes") for result in results}
    )
    machines = sorted({result["machine"]["name"] for result in results})
    minutes = [sum(result["cpu_seconds"].values()) / 60 for result in results]
    judges = sorted({result["judge"]["sha256"][:12] for result in results})
    return (
        f"{len(results)} points, on {', '.join(machines)} (shared with other work, so that seconds differ), commit "
        f"{', '.join(commits)}; {min(minutes):.1f} to {max(minutes):.1f} CPU minutes each, {sum(minutes):.0f} in all. "
        f"Judge {', '.join(judges)}.\n"
    )


def missing(results: Sequence[Result]) -> str:
    """Points of the plan without a result, batch by batch."""
    done = {result["point"] for result in results}
    left: dict[str, list[str]] = {}
    for point in read_points():
        if point.name not in done:
            left.setdefault(point.batch, []).append(point.name)
    if not left:
        return "None: every point of the plan is done.\n"
    total = sum(map(len, left.values()))
    lines = [f"{total} of {len(read_points())} points are still to run, in this order:", ""]
    return "\n".join(lines + [f"- {batch}: {', '.join(names)}" for batch, names in left.items()]) + "\n"
