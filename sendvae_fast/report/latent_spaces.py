"""The section of a page that shows latent spaces: t-SNE by class, and maps of patches that are alike, side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sendvae_fast.evaluation.latent_space.view import LatentView
from sendvae_fast.evaluation.latent_views import SILHOUETTE, SIMILARITY
from sendvae_fast.report.contents import Picture
from sendvae_fast.report.metric_names import metric_of
from sendvae_fast.report.scatter import mark_svg, scatter_svg


@dataclass(frozen=True)
class Plot:
    """A latent space in the plane."""

    title: str
    number: str
    """Its silhouette."""
    svg: Markup


@dataclass(frozen=True)
class Plane:
    """Latent spaces with the same classes."""

    legend: list[tuple[Markup, str]]
    """Mark and name of each class."""
    plots: list[Plot]


@dataclass(frozen=True)
class LatentSection:
    """What the section shows."""

    planes: list[Plane]
    columns: list[list[Picture]]
    """Maps of the same pictures: these, those of the foundation model, then a column of each latent space."""


def latent_section(views: Sequence[tuple[str, LatentView]]) -> LatentSection | None:
    """The section of latent spaces and their names, None where there is nothing to see."""
    planes, columns = _planes(views), _columns(views)
    return LatentSection(planes, columns) if planes or columns else None


def _planes(views: Sequence[tuple[str, LatentView]]) -> list[Plane]:
    found: dict[tuple[str, ...], Plane] = {}
    for name, view in views:
        classes = tuple(view.classes)
        if classes:
            legend = [(Markup(mark_svg(index)), title) for index, title in enumerate(classes)]
            number = _number("silhouette", SILHOUETTE, view)
            label = html.escape(f"{name}: latents of pictures of {len(classes)} classes in the plane. {number}", True)
            svg = Markup(scatter_svg(list(view.classes.values()), label))
            found.setdefault(classes, Plane(legend, [])).plots.append(Plot(name, number, svg))
    return list(found.values())


def _columns(views: Sequence[tuple[str, LatentView]]) -> list[list[Picture]]:
    groups: list[tuple[LatentView, list[Picture]]] = []
    for name, view in views:
        if "latents" not in view.sheets or "pictures" not in view.sheets:
            continue
        if not groups or not _of_same_pictures(groups[-1][0], view):
            groups.append((view, _beginning(view)))
        groups[-1][1].append(
            Picture(
                image=view.sheets["latents"],
                title=name,
                caption=_number("Spearman", f"{SIMILARITY}_{view.foundation}", view),
                alt=f"Which patches are alike in the latents of {name}: a map of each picture.",
            )
        )
    return [columns for _, columns in groups]


def _beginning(view: LatentView) -> list[Picture]:
    """The pictures, and the foundation model's maps where there are some."""
    columns = [
        Picture(
            image=view.sheets["pictures"],
            title="Pictures",
            caption="",
            alt="Held-out pictures, a frame around the patch that others are compared with.",
        )
    ]
    if "foundation" in view.sheets:
        columns.append(
            Picture(
                image=view.sheets["foundation"],
                title=view.foundation,
                caption="foundation model",
                alt=f"Which patches are alike to the foundation model {view.foundation}: a map of each picture.",
            )
        )
    return columns


def _of_same_pictures(one: LatentView, other: LatentView) -> bool:
    """Whether two views have the same pictures beside the same maps of a foundation model."""
    return one.foundation == other.foundation and all(
        (name in one.sheets) == (name in other.sheets)
        and (name not in one.sheets or np.array_equal(one.sheets[name], other.sheets[name]))
        for name in ("pictures", "foundation")
    )


def _number(label: str, metric: str, view: LatentView) -> str:
    value = view.numbers.get(metric)
    return "" if value is None else f"{label} {value:.{metric_of(metric).digits}f}"
