"""The demo's pictures: rendered scenes, or the user's photographs in two parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.indexing.index import CATALOG_SUFFIX
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.demo.settings import DemoConfig, image_size
from sendvae_fast.errors import UserError

HELD_OUT_EVERY = 5
"""Of a user's own photographs every fifth of a class is held out for evaluation."""


def prepare_pictures(config: DemoConfig, root: Path) -> tuple[Path, Path]:
    """Make what `picture_folders` names: rendered scenes, or catalogs of the user's photographs."""
    train, test = picture_folders(config, root)
    if config.data is None:
        synth_scenes(train, config.num_train_images, image_size(), seed=0)
        synth_scenes(test, config.num_test_images, image_size(), seed=1)
    else:
        split_photographs(Catalog.open(config.data), train, test)
    return train, test


def picture_folders(config: DemoConfig, root: Path) -> tuple[Path, Path]:
    """Where the training and the held-out pictures are: folders of scenes, or catalogs of photographs."""
    suffix = "" if config.data is None else CATALOG_SUFFIX
    return root / "data" / f"train{suffix}", root / "data" / f"test{suffix}"


def split_photographs(catalog: Catalog, train: Path, test: Path) -> None:
    """Write the catalogs of both parts: of every class, every `HELD_OUT_EVERY`th picture is held out.

    Raises UserError when that leaves nothing to train on or nothing to test with.
    """
    held_out = np.zeros(len(catalog), bool)
    for label in range(len(catalog.class_names)):
        held_out[np.flatnonzero(catalog.labels == label)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    if min(held_out.sum(), (~held_out).sum()) < 2:
        raise UserError(
            f"{catalog.root} has too few pictures for the demo: give classes of at least {HELD_OUT_EVERY} pictures, "
            f"and at least two such classes"
        )
    train.parent.mkdir(parents=True, exist_ok=True)
    catalog.subset(np.flatnonzero(~held_out)).save(train)
    catalog.subset(np.flatnonzero(held_out)).save(test)


def spread(catalog: Catalog, num: int) -> Tensor:
    """`num` pictures from all over a catalog, so from many classes: uint8 [num, 3, S, S]."""
    loader, step = ImageLoader(catalog, image_size()), max(len(catalog) // num, 1)
    return torch.cat([next(loader.in_order(1, start=i)).images for i in range(0, len(catalog), step)][:num])
