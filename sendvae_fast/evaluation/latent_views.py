"""A latent space made visible, with numbers beside: t-SNE of held-out pictures by class, maps of patch similarity."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.evaluation.latent_space.clusters import NUM_COMPONENTS, clusters, has_clusters, spread_over_classes
from sendvae_fast.evaluation.latent_space.patches import (
    LEAST_PATCHES,
    agreement,
    chosen_points,
    drawn_maps,
    maps_of,
    marked,
)
from sendvae_fast.evaluation.latent_space.settings import ViewsConfig
from sendvae_fast.evaluation.latent_space.view import LatentView
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.probing.encoding import encoded_rows
from sendvae_fast.evaluation.probing.scores import mean_with_interval
from sendvae_fast.evaluation.result import FeaturesOrigin, Measurement
from sendvae_fast.image_grid import image_grid
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.sit.sizes import is_sequence
from sendvae_fast.models.weights import weights_sha256

Sight = Literal["clusters", "patches"]
SIGHTS: tuple[Sight, ...] = get_args(Sight)
SILHOUETTE, SIMILARITY = "class_silhouette", "patch_similarity"
"""Metrics; the second goes on with the foundation model's name."""


class FoundationTokens(NamedTuple):
    """A foundation model's patch tokens of pictures."""

    grid: Tensor
    """float32 [n, D, G, G]."""
    origin: FeaturesOrigin


def pictures_to_view(pictures: CatalogPictures, config: ViewsConfig) -> tuple[np.ndarray, CatalogPictures]:
    """Ids of the held-out pictures that are looked at, and these pictures: the same for every autoencoder."""
    ids = spread_over_classes(pictures.catalog.labels, config.num_pictures, config.num_classes)
    return ids, CatalogPictures(pictures.catalog.subset(ids), pictures.origin.image_size)


def foundation_tokens(
    model: Foundation,
    config: FoundationConfig,
    pictures: CatalogPictures,
    folder: Path,
    batch_size: int,
    distributed: Distributed,
) -> FoundationTokens:
    """The tokens of pictures by the model of `config`, kept in `folder` as `encoded_rows` keeps them. Collective."""
    model = model.to(distributed.device)
    sha256 = weights_sha256(model.tokens.state_dict())
    rows = encoded_rows(model, f"{sha256} at {model.image_size}", pictures, folder, batch_size, distributed)
    tokens = torch.from_numpy(np.array(rows.features)).float().unflatten(1, (model.grid_size**2, model.dim))
    name = config.name.replace("-vit-", "_").replace("-", "_")
    origin = FeaturesOrigin(name=name, dim=model.dim, weights=config.weights or "the package's", sha256=sha256)
    return FoundationTokens(tokens.transpose(1, 2).unflatten(2, (model.grid_size, model.grid_size)), origin)


def sights_of(labels: np.ndarray, shape: tuple[int, int, int]) -> set[Sight]:
    """What there can be to see of latents [C, H, W]: `clusters` need classes, `patches` a grid of the picture."""
    found: set[Sight] = set()
    if has_clusters(labels):
        found.add("clusters")
    if not is_sequence(shape) and shape[1] * shape[2] >= LEAST_PATCHES:
        found.add("patches")
    return found


def view_latents(
    latents: np.ndarray,
    pictures: CatalogPictures,
    foundation: FoundationTokens | None,
    config: ViewsConfig,
    sights: Collection[Sight],
) -> tuple[LatentView, list[Measurement]]:
    """Look at latents.

    Args:
        latents: of `pictures`, normalised by channel, floating [n, C, H, W].
        pictures: those that `pictures_to_view` gave.
        foundation: tokens of the same pictures.
        config: how many maps are drawn.
        sights: what to look at, all of it in `sights_of` these latents.
    """
    classes: dict[str, np.ndarray] = {}
    measured: list[Measurement] = []
    labels, names = pictures.catalog.labels, pictures.catalog.class_names
    counts = {"pictures": len(latents)}
    if "clusters" in sights:
        found = clusters(latents, labels)
        present = np.unique(labels)
        classes = {names[label]: found.points[labels == label] for label in present}
        estimate = mean_with_interval(torch.from_numpy(found.silhouette))
        measured.append(
            Measurement(
                metric=SILHOUETTE,
                value=estimate.value,
                interval=estimate.interval,
                interval_of="test pictures",
                protocol=f"silhouette of flattened normalised latents on {NUM_COMPONENTS} principal components",
                counts=counts | {"classes": len(present)},
            )
        )
    sheets: dict[str, np.ndarray] = {}
    if "patches" in sights:
        cells = torch.from_numpy(latents).float()
        if foundation is not None and min(*cells.shape[2:], foundation.grid.shape[-1]) ** 2 >= LEAST_PATCHES:
            estimate = mean_with_interval(agreement(cells, foundation.grid))
            measured.append(
                Measurement(
                    metric=f"{SIMILARITY}_{foundation.origin.name}",
                    value=estimate.value,
                    interval=estimate.interval,
                    interval_of="test pictures",
                    protocol="Spearman's correlation of cosines over pairs of patches, mean over pictures",
                    features=foundation.origin,
                    counts=counts,
                )
            )
        sheets = _sheets(cells, pictures, foundation, config.num_shown)
    numbers = {measurement.metric: measurement.value for measurement in measured}
    name = "" if foundation is None or not sheets else foundation.origin.name
    return LatentView(classes=classes, numbers=numbers, foundation=name, sheets=sheets), measured


def _sheets(
    cells: Tensor, pictures: CatalogPictures, foundation: FoundationTokens | None, num_shown: int
) -> dict[str, np.ndarray]:
    """Columns of tiles of some pictures from all over: the pictures, and the maps of what there is."""
    ids = np.unique(np.linspace(0, len(cells) - 1, min(len(cells), num_shown)).round().astype(np.int64))
    images = torch.cat([next(pictures.batches(1, start, start + 1)) for start in ids.tolist()]).cpu()
    points, size = chosen_points(images), images.shape[-1]
    tiles = {"pictures": marked(images, points)}
    if foundation is not None:
        tiles["foundation"] = drawn_maps(maps_of(foundation.grid[ids], points), points, size)
    tiles["latents"] = drawn_maps(maps_of(cells[ids], points), points, size)
    return {name: image_grid(column, columns=1) for name, column in tiles.items()}
