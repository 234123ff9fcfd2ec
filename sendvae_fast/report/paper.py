"""The paper's rows, and why a result cannot be put beside them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sendvae_fast.evaluation.result import Result
from sendvae_fast.report.contents import RunRecord

TABLE = Path(__file__).parent / "paper_results.csv"
AUTOENCODERS = ("VA-VAE", "Send-VAE")
"""Those whose rows are shown: where the paper starts, and what it makes of it."""
NUM_PICTURES, IMAGE_SIZE_PX, NUM_STEPS, GUIDANCE = 50_000, 256, 250, 2.5
RECONSTRUCTION = ("rfid", "psnr", "ssim", "lpips")
OF_FEATURES = ("fid", "sfid", "inception_score", "precision", "recall", "rfid")
BENCHMARKS = {"celeba_f1": "CelebA", "deepfashion_f1": "DeepFashion", "awa_f1": "AwA"}
FAMILIES = {
    "rfrechet": "rfid",
    "spatial_frechet": "sfid",
    "frechet": "fid",
    "inception_score": "inception_score",
    "precision": "precision",
    "recall": "recall",
    "lpips": "lpips",
}
"""The paper's metric by the beginning of a metric's name."""
EXACT = {"fid": "fid", "sfid": "sfid", "rfid": "rfid", "psnr": "psnr", "ssim": "ssim", "attribute_f1": "attribute_f1"}
NOT_ITS = ("frechet_infinity",)
"""Metrics that are called like one of the paper's and are another."""
LONG_TRAINING = 400
"""Epochs from which on a generator is put beside the rows of 800 epochs, not those of 80."""


@dataclass(frozen=True)
class PaperValue:
    """A value of one of the paper's rows."""

    text: str
    where: str
    """Its table, and the generator where it has one."""


@dataclass(frozen=True)
class _Row:
    autoencoder: str
    table: str
    generator: str
    epochs: str
    guided: str
    metric: str
    value: str


def paper_metric(metric: str) -> str | None:
    """The paper's metric that one of ours corresponds to, whatever its features; None where there is none."""
    if metric.startswith(NOT_ITS):
        return None
    if metric in EXACT:
        return EXACT[metric]
    return next(
        (theirs for family, theirs in FAMILIES.items() if metric == family or metric.startswith(f"{family}_")), None
    )


def guidance_of(result: Result) -> float | None:
    """The guidance that drew a result's pictures; None where none were drawn, or nobody says how."""
    samples = result.pictures.get("samples")
    scale = None if samples is None else samples.settings.get("guidance_scale")
    return float(scale) if isinstance(scale, (int, float)) else None


def paper_value(autoencoder: str, result: Result, runs: Sequence[RunRecord]) -> PaperValue | None:
    """What the paper has for an autoencoder where one of ours has `result`; None where it has nothing.

    Args:
        autoencoder: one of `AUTOENCODERS`.
        result: of any of the runs.
        runs: those side by side: of a generator called XL the paper's XL/1 are taken, else its SiT-B/1.
    """
    metric = paper_metric(result.metric)
    rows = [row for row in _rows() if row.autoencoder == autoencoder]
    if metric == "attribute_f1":
        found = [row for row in rows if row.metric in BENCHMARKS]
        return PaperValue(", ".join(f"{BENCHMARKS[row.metric]} {row.value}" for row in found), found[0].table)
    if metric in RECONSTRUCTION:
        row = next(row for row in rows if row.metric == metric)
        return PaperValue(row.value, row.table)
    generators = [run for run in runs if run.stage == "generator"]
    is_large = any("XL" in _preset(run) for run in generators)
    is_long = is_large and any((run.epochs or 0) >= LONG_TRAINING for run in generators)
    wanted = (
        "XL/1" if is_large else "SiT-B/1",
        "800" if is_long else "80",
        "no" if guidance_of(result) in (None, 1.0) else "yes",
    )
    for row in rows:
        if row.metric == metric and (row.generator, row.epochs, row.guided) == wanted:
            return PaperValue(row.value, f"{row.table}, {row.generator}, {row.epochs} epochs")
    return None


def why_not_beside_the_paper(result: Result) -> list[str]:
    """What differs between how a result and the paper's number of that name were measured, in words."""
    metric, reasons = paper_metric(result.metric), []
    if metric in OF_FEATURES and (result.features is None or result.features.name != "inception"):
        name = "unknown" if result.features is None else result.features.name
        reasons.append(f"features of {name}, not of Inception")
    if metric == "lpips" and not result.metric.endswith("vgg"):
        reasons.append("LPIPS of another network than VGG")
    if metric == "attribute_f1":
        reasons.append("the paper does not say how it fits its probe, nor which mean of F1 it gives")
        return [*reasons, *_other_pictures(result, ("celeba", "deepfashion", "awa"), "the paper's benchmarks")]
    if metric in RECONSTRUCTION and not result.protocol.startswith("lightningdit"):
        reasons.append("another protocol than the tokenizer papers' (lightningdit)")
    if metric not in RECONSTRUCTION and metric in OF_FEATURES and result.protocol != "adm":
        reasons.append("another protocol than ADM's")
    num = min((count for role, count in result.counts.items() if role != "reference"), default=0)
    if num < NUM_PICTURES:
        reasons.append(f"{num:,} pictures, not {NUM_PICTURES:,}")
    sizes = {origin.image_size for origin in result.pictures.values() if origin.image_size}
    if sizes - {IMAGE_SIZE_PX}:
        reasons.append(f"pictures of {', '.join(map(str, sorted(sizes)))} px, not {IMAGE_SIZE_PX}")
    return [*reasons, *_other_sampling(result), *_other_pictures(result, ("imagenet",), "ImageNet")]


def _preset(run: RunRecord) -> str:
    generator = run.config.get("generator")
    return str(generator.get("preset")) if isinstance(generator, dict) else ""


def _other_sampling(result: Result) -> list[str]:
    samples = result.pictures.get("samples")
    if samples is None:
        return []
    sampler, guidance = samples.settings.get("sampler"), guidance_of(result)
    if not isinstance(sampler, dict) or guidance is None:
        return ["nobody says how the pictures were drawn"]
    drawn = f"{sampler.get('num_steps')} steps of {sampler.get('kind')}"
    reasons = [] if drawn == f"{NUM_STEPS} steps of sde" else [f"drawn in {drawn}, not {NUM_STEPS} of sde"]
    return reasons if guidance in (1.0, GUIDANCE) else [*reasons, f"guidance {guidance:g}, not {GUIDANCE:g}"]


def _other_pictures(result: Result, names: Sequence[str], whose: str) -> list[str]:
    """A reason where no name of a folder of real pictures is the paper's: more than names a result does not know."""
    real = [origin.path.lower() for role, origin in result.pictures.items() if role != "samples"]
    return [] if any(name in path for name in names for path in real) else [f"other pictures than {whose}"]


@cache
def _rows() -> tuple[_Row, ...]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        lines = (line for line in file if not line.startswith("#"))
        return tuple(_Row(**row) for row in csv.DictReader(lines))
