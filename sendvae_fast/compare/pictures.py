"""The pictures of a comparison: rendered scenes, or photographs in two parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.compare.settings import PicturesConfig
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.indexing.index import CATALOG_SUFFIX
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.errors import UserError

HELD_OUT_EVERY = 5
"""Where no photographs are given as held out, every fifth of a class is."""


def prepare_pictures(config: PicturesConfig, root: Path) -> None:
    """Make what `picture_folders` names: rendered scenes, or catalogs of photographs that are given in one."""
    train, test = picture_folders(config, root)
    if config.data is None:
        synth_scenes(train, config.num_train_images, config.image_size, seed=0)
        synth_scenes(test, config.num_test_images, config.image_size, seed=1)
    elif config.held_out is None:
        split_photographs(Catalog.open(config.data), train, test)


def picture_folders(config: PicturesConfig, root: Path) -> tuple[Path, Path]:
    """Where the training and the held-out pictures are: folders of scenes, or catalogs of photographs."""
    if config.data is not None and config.held_out is not None:
        return Path(config.data), Path(config.held_out)
    suffix = "" if config.data is None else CATALOG_SUFFIX
    return root / "data" / f"train{suffix}", root / "data" / f"test{suffix}"


def num_pictures(config: PicturesConfig) -> tuple[int, int]:
    """How many pictures there will be to train on and to test with.

    Raises:
        UserError: the photographs cannot be opened, or are too few.
    """
    if config.data is None:
        return config.num_train_images, config.num_test_images
    catalog = Catalog.open(config.data)
    if config.held_out is not None:
        return len(catalog), len(Catalog.open(config.held_out))
    num_held_out = int(held_out_of(catalog).sum())
    return len(catalog) - num_held_out, num_held_out


def split_photographs(catalog: Catalog, train: Path, test: Path) -> None:
    """Write the catalogs of both parts: of every class, every `HELD_OUT_EVERY`th picture is held out.

    Raises UserError when that leaves nothing to train on or nothing to test with.
    """
    held_out = held_out_of(catalog)
    train.parent.mkdir(parents=True, exist_ok=True)
    catalog.subset(np.flatnonzero(~held_out)).save(train)
    catalog.subset(np.flatnonzero(held_out)).save(test)


def held_out_of(catalog: Catalog) -> np.ndarray:
    """Which pictures are held out, bool [N]. Raises UserError where too few would be on either side."""
    held_out = np.zeros(len(catalog), bool)
    for label in range(len(catalog.class_names)):
        held_out[np.flatnonzero(catalog.labels == label)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    if min(held_out.sum(), (~held_out).sum()) < 2:
        raise UserError(
            f"{catalog.root} has too few pictures: give classes of at least {HELD_OUT_EVERY} pictures, and at least "
            "two such classes"
        )
    return held_out


def spread(catalog: Catalog, num: int, image_size: int) -> Tensor:
    """`num` pictures from all over a catalog, so from many classes: uint8 [num, 3, S, S]."""
    loader, step = ImageLoader(catalog, image_size), max(len(catalog) // num, 1)
    return torch.cat([next(loader.in_order(1, start=i)).images for i in range(0, len(catalog), step)][:num])
