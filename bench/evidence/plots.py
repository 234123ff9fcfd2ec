"""The plots of docs/evidence.md, as small SVGs that carry the fingerprint of the results they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.evidence.analysis import MEASURES, Result, by_variant, difference
from bench.evidence.study import read_variants_file
from sendvae_fast.files import staged_output

COLOURS = {
    "control": "#888888",
    "send": "#2a6f97",
    "control_repa": "#c8a13a",
    "send_repa": "#b5483a",
    "control_fine": "#888888",
    "send_fine": "#2a6f97",
}
FINER = ("control_fine", "send_fine")
STARTS = {"": ("control", "send", "control_repa", "send_repa"), ", finer autoencoder": FINER}
"""The variants that are drawn together, by what their panels' titles add: those of one plain autoencoder."""
PREFIX = "evidence_"
PLOTS = {
    "curves": "Distance and class accuracy over the generator's steps; dotted: the floor",
    "differences": "Each variant's distances minus its control's, with seeds: left is better",
    "noise_levels": "The velocity's loss by noise level",
    "latents": "Spectra of latents, and what an error in them costs",
    "f1": "Attribute F1 against the distances; hollow: without alignment, square: the finer autoencoder",
}
"""What each shows, by its name."""
DISTANCES = {"frechet": "Fréchet distance", "from_decoded": "Fréchet distance from decoded latents"}
"""The measures that variants are compared by, with their titles."""

Variants = Mapping[str, Mapping[int, Result]]


def draw_plots(results: Sequence[Result], folder: Path, fingerprint: str) -> list[Path]:
    """Write all plots that the results allow; returns their files."""
    variants = by_variant(results)
    draw = {"curves": curves, "noise_levels": noise_levels, "latents": latents, "differences": differences, "f1": f1}
    return [_save(draw[name](variants), folder / file_name(name), fingerprint) for name in names(results)]


def names(results: Sequence[Result]) -> list[str]:
    """Of the plots that the results allow: none before the main comparison has begun."""
    variants = by_variant(results)
    return list(PLOTS) if all(variants.get(name) for name in ("control", "send")) else []


def file_name(name: str) -> str:
    return f"{PREFIX}{name}.svg"


def _save(figure: Any, path: Path, fingerprint: str) -> Path:
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none"}), staged_output(path) as unfinished:
        figure.savefig(unfinished, format="svg", metadata={"Date": None, "Description": fingerprint})
    return path


def _figure(columns: int, width: float = 4.2, height: float = 3.2, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its panels [rows * columns], row by row; width and height are a panel's, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _drawn(variants: Variants) -> list[tuple[str, dict[str, list[Result]]]]:
    """Of each start that has results: what titles add, and its variants' results."""
    found = [
        (title, {name: list(variants[name].values()) for name in names if variants.get(name)})
        for title, names in STARTS.items()
    ]
    return [(title, results) for title, results in found if results]


def curves(variants: Variants) -> Any:
    """Distance and class accuracy over the generator's steps: a thin line for each seed, a thick one for the mean."""
    drawn, titles = _drawn(variants), {"frechet": "Fréchet distance", "class_accuracy": "class accuracy"}
    figure, panels = _figure(len(titles), rows=len(drawn))
    cells = [(start, results, key) for start, results in drawn for key in titles]
    for panel, (start, variants_of, key) in zip(panels, cells, strict=True):
        for name, results in variants_of.items():
            curves_of = [
                {at["step"]: at["unguided"]["decoders"]["own"][key] for at in result["curve"]} for result in results
            ]
            # A run that was interrupted before this was known was measured where it stopped, too.
            steps = sorted(set.intersection(*map(set, curves_of)))
            lines = [[curve[step] for step in steps] for curve in curves_of]
            for line in lines:
                panel.plot(steps, line, color=COLOURS[name], linewidth=0.6, alpha=0.5)
            panel.plot(steps, np.mean(lines, axis=0), color=COLOURS[name], linewidth=2, marker="o", label=name)
            if key == "frechet":
                floor = np.mean([result["autoencoder"]["floor"]["frechet"] for result in results])
                panel.axhline(floor, color=COLOURS[name], linewidth=0.8, linestyle=":")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("steps of the generator", fontsize=8)
        panel.set_title(f"{titles[key]}, without guidance{start}", fontsize=9)
        panel.legend(fontsize=7, frameon=False)
    return figure


def noise_levels(variants: Variants) -> Any:
    """The velocity's loss by noise level, over the best linear estimate's and as an error of the latent."""
    titles = {"of_gaussian": "velocity loss over the linear estimate's", "denoising_error": "error, share of variance"}
    drawn = _drawn(variants)
    figure, panels = _figure(len(titles), rows=len(drawn))
    cells = [(start, results, key) for start, results in drawn for key in titles]
    for panel, (start, variants_of, key) in zip(panels, cells, strict=True):
        for name, results in variants_of.items():
            found = [result["curve"][-1][key] for result in results]
            levels = [float(level) for level in found[0]]
            values = np.array([list(one.values()) for one in found])
            panel.plot(levels, values.mean(axis=0), color=COLOURS[name], marker="o", markersize=3, label=name)
            panel.fill_between(levels, values.min(axis=0), values.max(axis=0), color=COLOURS[name], alpha=0.2)
        panel.set_xlabel("noise level t", fontsize=8)
        panel.set_title(f"{titles[key]}{start}", fontsize=9)
        panel.legend(fontsize=7, frameon=False)
    return figure


def latents(variants: Variants) -> Any:
    """Power by ring of frequencies, and what an error in latents costs decoded pictures."""
    figure, panels = _figure(3, width=3.4)
    names = [name for name in ("control", "send") if variants.get(name)]
    for offset, name in enumerate(names):
        bands = np.array([result["autoencoder"]["band_powers"] for result in variants[name].values()]).mean(axis=0)
        rings = np.flatnonzero(bands > 0)
        panels[0].bar(np.arange(len(rings)) + 0.4 * offset, bands[rings], 0.4, color=COLOURS[name], label=name)
        panels[0].set_xticks(np.arange(len(rings)) + 0.2, ["mean", *(f"ring {ring}" for ring in rings[1:])], fontsize=7)
        for panel, key in ((panels[1], "with_error"), (panels[2], "psnr")):
            found = [result["autoencoder"][key] for result in variants[name].values()]
            values = np.array([list(one.values()) for one in found])
            levels = [float(level) for level in found[0]]
            panel.plot(levels, values.mean(axis=0), color=COLOURS[name], marker="o", markersize=3, label=name)
            panel.fill_between(levels, values.min(axis=0), values.max(axis=0), color=COLOURS[name], alpha=0.2)
    titles = ("share of the latents' power", "distance of decoded latents with noise", "their PSNR, dB")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=9)
        panel.legend(fontsize=7, frameon=False)
    for panel in panels[1:]:
        panel.set_xlabel("noise, standard deviations", fontsize=8)
    return figure


def differences(variants: Variants) -> Any:
    """Each variant's distances minus its control's, with the interval over seeds."""
    known = read_variants_file()
    compared = [
        (key, variant.control) for key, variant in known.items()
        if variant.control is not None and variants.get(key) and variants.get(variant.control)
    ]  # fmt: skip
    figure, panels = _figure(len(DISTANCES), height=0.9 + 0.3 * max(len(compared), 1))
    for panel, (measure, title) in zip(panels, DISTANCES.items(), strict=True):
        labels = []
        for place, (key, control) in enumerate(reversed(compared)):
            estimate = difference(MEASURES[measure], variants[key], variants[control])
            labels.append(key if estimate is None else f"{key} ({estimate.num_seeds})")
            if estimate is None:
                continue
            if estimate.interval is not None:
                panel.plot(estimate.interval, [place, place], color="#2a6f97", linewidth=1.5)
            panel.plot(estimate.value, place, "o", color="#2a6f97", markersize=5)
        panel.axvline(0, color="#888888", linewidth=0.8)
        panel.set_yticks(range(len(labels)), labels if panel is panels[0] else [], fontsize=8)
        panel.set_title(f"{title}\nminus the control's", fontsize=9)
    return figure


def f1(variants: Variants) -> Any:
    """Attribute F1 against the distances, a point for each result; hollow: without alignment."""
    from matplotlib import colormaps

    known, colours = read_variants_file(), [colormaps["tab20"](place) for place in range(20)]
    shown = [key for key in known if variants.get(key)]
    figure, panels = _figure(len(DISTANCES))
    for panel, (measure, title) in zip(panels, DISTANCES.items(), strict=True):
        for place, key in enumerate(shown):
            found = [(MEASURES["f1"].of(result), MEASURES[measure].of(result)) for result in variants[key].values()]
            colour = colours[place % len(colours)]
            panel.scatter(
                *zip(*found, strict=True), s=22, marker="s" if key in FINER else "o", edgecolors=[colour],
                facecolors="none" if known[key].control is None else [colour], label=key,
            )  # fmt: skip
        panel.set_xlabel("attribute F1 of a linear probe", fontsize=8)
        panel.set_title(title, fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=6, frameon=False, loc="outside right center")
    return figure
