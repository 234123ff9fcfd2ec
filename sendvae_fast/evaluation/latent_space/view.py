"""A latent space as it is looked at, in a folder: points of t-SNE by class, and sheets of patch-similarity maps.

latent_space/view.json  pictures.png  latents.png  foundation.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sendvae_fast.files import staged_output
from sendvae_fast.png import read_png, write_png
from sendvae_fast.reading import NotOfItsKind, numbers_in, read_json, reading

VIEW_FOLDER = "latent_space"
"""In the run, or the trial, that was measured."""
VIEW_FILE = "view.json"
SHEETS = ("pictures", "foundation", "latents")
"""Pictures with the chosen patch, and the maps of the foundation model and of the latents: tiles below each other."""
MAX_COORDINATE = 1e6
"""Of a point; t-SNE's are below a hundred or so."""
_REMEDY = "remove its folder, or measure again"


@dataclass(frozen=True, kw_only=True)
class LatentView:
    """What there is to see of a latent space."""

    classes: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Points of t-SNE, float [n, 2], by the name of their class."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Values of the metrics that go with it, by name."""
    foundation: str = ""
    """Name of the foundation model whose maps are beside the latents'."""
    sheets: Mapping[str, np.ndarray] = field(default_factory=dict)
    """uint8 [H, W, 3] by what it shows, of `SHEETS`."""


def write_view(folder: Path, view: LatentView) -> None:
    """Write a folder, in place of one that is there.

    Raises:
        UserError: the disk is full, or the folder cannot be made.
    """
    for name, sheet in view.sheets.items():
        write_png(folder / f"{name}.png", sheet)
    content = {
        "classes": [{"name": name, "points": points.round(3).tolist()} for name, points in view.classes.items()],
        "numbers": dict(view.numbers),
        "foundation": view.foundation,
        "sheets": list(view.sheets),
    }
    with staged_output(folder / VIEW_FILE) as unfinished:
        unfinished.write_text(json.dumps(content) + "\n")


def read_view(folder: Path) -> LatentView | None:
    """The view in a folder; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / VIEW_FILE
    if not path.is_file():
        return None
    content = read_json(path, _REMEDY)
    with reading(folder, _REMEDY):
        return LatentView(
            classes={str(part["name"]): _points(part["points"]) for part in content["classes"]},
            numbers=numbers_in(content["numbers"]),
            foundation=str(content["foundation"]),
            sheets={name: read_png(folder / f"{name}.png") for name in SHEETS if name in content["sheets"]},
        )


def _points(content: Any) -> np.ndarray:
    points = np.array(content, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not (np.abs(points) < MAX_COORDINATE).all():
        raise NotOfItsKind("points are not pairs of numbers")
    return points
