"""Points of classes in the plane as inline SVG in the colours of the page. t-SNE's axes mean nothing: none is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sendvae_fast.report.charts import NUM_COLOURS

SIDE, MARGIN = 240, 10
"""Of the drawing, in units of its own."""
DOT, CROSS = 5.5, 2.3
"""Width of a dot, and half of a cross's."""


def scatter_svg(classes: Sequence[np.ndarray], label: str) -> str:
    """An `<svg>` of points [n, 2] of each class, the same scale along both axes.

    Args:
        classes: finite, one array per class, whose mark is `mark_svg` of its number.
        label: for readers who do not see it, escaped.
    """
    everything = np.concatenate(classes)
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = (SIDE - 2 * MARGIN) / (float((high - low).max()) or 1.0)
    marks = [_marks((points - (low + high) / 2) * scale + SIDE / 2, index) for index, points in enumerate(classes)]
    frame = f'<rect x="0.5" y="0.5" width="{SIDE - 1}" height="{SIDE - 1}" rx="6" fill="none" stroke="var(--rule)"/>'
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {SIDE} {SIDE}">{frame}{"".join(marks)}</svg>'


def mark_svg(index: int) -> str:
    """The mark of a class, for a legend: dots in the colours of the page, and after the last of them crosses."""
    return f'<svg class="point" aria-hidden="true" viewBox="-4 -4 8 8">{_marks(np.zeros((1, 2)), index)}</svg>'


def _marks(points: np.ndarray, index: int) -> str:
    """A `<path>` of all points of a class."""
    colour = f"var(--series-{index % NUM_COLOURS})"
    if index // NUM_COLOURS % 2 == 0:  # a line of no length with round ends
        shapes = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        return f'<path d="{shapes}" stroke="{colour}" stroke-width="{DOT}" stroke-linecap="round" opacity="0.85"/>'
    half, whole = CROSS, 2 * CROSS
    shapes = "".join(
        f"M{x - half:.1f} {y - half:.1f}l{whole} {whole}m0 {-whole}l{-whole} {whole}" for x, y in points
    )  # fmt: skip
    return f'<path d="{shapes}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
