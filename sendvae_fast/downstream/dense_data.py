"""Pictures with a segmentation, and a depth map where one is known: rendered scenes, or any pictures with trimaps.

Shape letters: n pictures, S picture size, K segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.scenes.ground_truth import SEGMENT_NAMES, scene_truth
from sendvae_fast.data.scenes.scene import draw_scene
from sendvae_fast.data.scenes.scene_folder import SCENES_FILE
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.reading import count_in, read_json, reading

VOID = 255
"""Of pixels that belong to no segment and are not counted."""
TRIMAP_NAMES = ("pet", "background")
"""Of the Oxford-IIIT pets' trimaps, values 1 and 2; 3 is the border between them, which is `VOID` here."""


@dataclass(frozen=True)
class DensePictures:
    """Pictures and what is known of their pixels."""

    pictures: CatalogPictures
    segment_names: tuple[str, ...]
    """Of the K segments."""
    segments: Tensor
    """uint8 [n, S, S]: 0 .. K - 1, or `VOID`."""
    distances: Tensor | None
    """float32 [n, S, S], above 0; None where they are not known."""


def open_dense(where: str, trimaps: str | None, image_size: int, num: int) -> DensePictures:
    """Up to `num` pictures from all over a folder, with their truth.

    Args:
        where: scenes of `sendvae data synth`, or with `trimaps` any pictures that `Catalog.open` takes.
        trimaps: folder with `<name of the picture>.png`, as the pets' `annotations/trimaps`.
        image_size: side of the ADM centre crop.
        num: pictures at most.

    Raises:
        UserError: there are no pictures, or nothing is known of their pixels.
    """
    catalog = Catalog.open(where)
    catalog = catalog.subset(np.linspace(0, len(catalog) - 1, min(num, len(catalog))).astype(np.int64))
    pictures = CatalogPictures(catalog, image_size)
    stems = [Path(name).stem for name in catalog.names]
    if trimaps is not None:
        found = [_read_trimap(Path(trimaps) / f"{stem}.png", image_size) for stem in stems]
        return DensePictures(pictures, TRIMAP_NAMES, torch.from_numpy(np.stack(found)), None)
    note, remedy = Path(where) / SCENES_FILE, "give scenes of `sendvae data synth`, or --trimaps"
    if not note.is_file():
        raise UserError(f"nothing is known of the pixels of {where}, which has no {SCENES_FILE}: {remedy}")
    arguments = read_json(note, remedy)
    with reading(note, remedy):
        seed = count_in(arguments, "seed")
        truths = [scene_truth(draw_scene(seed, int(stem)), image_size) for stem in stems]
    segments, distances = (torch.from_numpy(np.stack(part)) for part in zip(*truths, strict=True))
    return DensePictures(pictures, SEGMENT_NAMES, segments, distances)


def _read_trimap(path: Path, size: int) -> np.ndarray:
    """The ADM centre crop of a trimap, by nearest neighbours: uint8 [size, size], 0 pet, 1 background or `VOID`."""
    if not path.is_file():
        raise UserError(f"there is no trimap {path}: give the folder of trimaps of these pictures as --trimaps")
    with reading(path, "fetch the trimaps again"), Image.open(path, formats=("PNG",)) as opened:
        image = opened.copy()
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    resized = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))
    if image.mode not in ("L", "P") or not np.isin(resized, (1, 2, 3)).all():
        raise UserError(f"{path} is no trimap of 1 (pet), 2 (background) and 3 (border): give the pets' trimaps")
    top, left = (height - size) // 2, (width - size) // 2
    cropped = resized[top : top + size, left : left + size]
    return np.where(cropped == 3, VOID, cropped - 1).astype(np.uint8)
