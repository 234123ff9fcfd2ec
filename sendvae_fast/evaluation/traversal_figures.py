"""Pictures of traversals: a strip per attribute from minus to plus, and how much every attribute changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from sendvae_fast.files import staged_output
from sendvae_fast.image_grid import image_grid


def draw_strips(path: Path, strips: Mapping[str, Tensor], names: Sequence[str], steps: Sequence[float]) -> None:
    """A row per attribute, autoencoders side by side.

    Args:
        path: of the PNG.
        strips: by autoencoder, uint8 [A, number of steps, 3, S, S].
        names: of the A attributes.
        steps: in deviations of the attribute's logit.
    """
    from matplotlib.figure import Figure

    size = next(iter(strips.values())).shape[-1] / 100
    width = max(0.5, min(size, 1.2)) * len(steps)
    figure = Figure(figsize=(1.2 + width * len(strips), 0.6 + len(names) * width / len(steps)), layout="constrained")
    panels = figure.subplots(len(names), len(strips), squeeze=False)
    for column, (autoencoder, pictures) in enumerate(strips.items()):
        for row, name in enumerate(names):
            panel = panels[row, column]
            sheet = image_grid(pictures[row], columns=len(steps))
            panel.imshow(sheet, interpolation="nearest", aspect="equal")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if column == 0:
                panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            if row == 0:
                panel.set_title(f"{autoencoder}: {steps[0]:+g} to {steps[-1]:+g} deviations", fontsize=9)
    with staged_output(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)


def draw_matrices(path: Path, effects: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """How attributes (columns) change along the direction of each (rows), autoencoders side by side on one scale.

    Args:
        path: of the PNG.
        effects: by autoencoder, [A, A].
        names: of the A attributes.
    """
    from matplotlib.figure import Figure

    limit = max(np.abs(matrix).max() for matrix in effects.values()) or 1.0
    side = 1.5 + 0.24 * len(names)
    figure = Figure(figsize=(side * len(effects) + 1, side + 0.4), layout="constrained")
    panels = figure.subplots(1, len(effects), squeeze=False)[0]
    for panel, (autoencoder, matrix) in zip(panels, effects.items(), strict=True):
        panel.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.set_title(autoencoder, fontsize=9)
        panel.set_ylabel("moved along", fontsize=8)
        panel.set_xlabel("change of the judge's logit, deviations", fontsize=8)
    figure.colorbar(panels[0].images[0], ax=list(panels), shrink=0.8)
    with staged_output(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)
