"""Renders synthetic scenes into a JPEG ImageFolder with known attributes.

    root/<shape>_<texture>/<scene id>.jpg   attributes.csv (file, then one 0/1 column per attribute)   scenes.json

`scenes.json` holds the arguments, is written first, and lets a later call continue or find that nothing is left to do.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sendvae_fast.data.attributes import ATTRIBUTES_FILE, write_attributes
from sendvae_fast.data.scenes.scene import ATTRIBUTES, CLASS_NAMES, draw_scene, render_scene
from sendvae_fast.errors import UserError
from sendvae_fast.files import remove_unfinished, staged, unfinished_files, write_atomic
from sendvae_fast.processes import process_pool
from sendvae_fast.progress import Progress
from sendvae_fast.reading import read_json

SCENES_FILE = "scenes.json"
SCENES_VERSION = 1
"""Raised when the same (seed, id) would render another picture."""
JPEG_QUALITY = 92
CHUNK = 64
IN_PROCESS_LIMIT = 256
"""With fewer pictures than this, starting worker processes costs more than it saves."""


def synth_scenes(
    root: str | Path, num_images: int, size: int = 64, seed: int = 0, num_workers: int | None = None
) -> Path:
    """Render scenes 0 .. num_images - 1 of family `seed` as `size` x `size` JPEGs under `root` and return `root`.

    The files depend on (num_images, size, seed) only, never on `num_workers` (default: one per available core). An
    interrupted call is continued by the next one with the same arguments; a finished one is left alone, with a line on
    stderr that says so. Worker processes are spawned: call this from a script's `if __name__ == "__main__"` part.

    Raises:
        UserError: for arguments out of range, and when `root` already holds something else.
    """
    root = Path(root)
    arguments = {"version": SCENES_VERSION, "num_images": num_images, "size": size, "seed": seed}
    if num_images < 1 or size < 8 or seed < 0:
        raise UserError(
            f"cannot render scenes with num_images {num_images}, size {size}, seed {seed}: "
            "give at least 1 image, a size of at least 8 pixels and a seed of at least 0"
        )
    _claim_folder(root, arguments)
    missing = [i for i in range(num_images) if not _is_written(root / scene_path(i))]
    if not missing and (root / ATTRIBUTES_FILE).exists():
        print(f"scenes: all {num_images} pictures are already in {root}, nothing to do", file=sys.stderr)
        return root
    for name in CLASS_NAMES:
        (root / name).mkdir(exist_ok=True)
        remove_unfinished(root / name)
    with Progress("rendering scenes", num_images, unit="image", start=num_images - len(missing)) as progress:
        for count in _map_chunks(partial(_write_scenes, root, seed, size), missing, num_workers):
            progress.advance(count)
    write_attributes(root, ATTRIBUTES, ((scene_path(i), _attribute_values(seed, i)) for i in range(num_images)))
    return root


def render_scenes(
    ids: Sequence[int], size: int = 64, seed: int = 0, num_workers: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render scenes in memory: images uint8 [B, 3, size, size], labels int64 [B], attributes bool [B, A]."""
    images = np.empty((len(ids), 3, size, size), np.uint8)
    done = 0
    with Progress("rendering scenes", len(ids), unit="image") as progress:
        for chunk in _map_chunks(partial(_render_chunk, seed, size), ids, num_workers):
            images[done : done + len(chunk)] = chunk
            done += len(chunk)
            progress.advance(len(chunk))
    scenes = [draw_scene(seed, i) for i in ids]
    labels = np.array([scene.label for scene in scenes], np.int64)
    return images, labels, np.array([list(scene.attributes.values()) for scene in scenes], bool)


def scene_path(scene_id: int) -> str:
    """Where scene `scene_id` lies under the root, with forward slashes: `<class>/<id>.jpg`."""
    return f"{CLASS_NAMES[scene_id % len(CLASS_NAMES)]}/{scene_id:06d}.jpg"


def _claim_folder(root: Path, arguments: dict[str, int]) -> None:
    """Make `root` and note the arguments in it, or check that it was made with the same ones."""
    if root.exists() and not root.is_dir():
        raise UserError(f"cannot render scenes into {root}: it is a file; give a folder")
    root.mkdir(parents=True, exist_ok=True)
    note = root / SCENES_FILE
    if note.exists():
        found = read_json(note, f"remove the folder {root} or give another one")
        if found != arguments:
            raise UserError(
                f"{root} holds scenes made with {found!s:.200}, not {arguments}; remove it, give another folder, "
                "or use the same arguments"
            )
    elif set(root.iterdir()) - set(unfinished_files(root)):
        raise UserError(f"{root} is not empty and was not made by this command; give an empty or a new folder")
    else:
        write_atomic(note, json.dumps(arguments))


def _is_written(path: Path) -> bool:
    """Whether a picture is there; a power cut may leave an empty file of one that was not flushed."""
    return path.exists() and path.stat().st_size > 0


def _attribute_values(seed: int, scene_id: int) -> list[int]:
    attributes = draw_scene(seed, scene_id).attributes
    return [int(attributes[name]) for name in ATTRIBUTES]


def _write_scenes(root: Path, seed: int, size: int, ids: Sequence[int]) -> int:
    for scene_id in ids:
        image = Image.fromarray(render_scene(draw_scene(seed, scene_id), size))
        with staged(root / scene_path(scene_id), durable=False) as unfinished:
            # Full-resolution chroma: at 64 pixels, subsampling would smear the textures.
            image.save(unfinished, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return len(ids)


def _render_chunk(seed: int, size: int, ids: Sequence[int]) -> np.ndarray:
    images = np.stack([render_scene(draw_scene(seed, i), size) for i in ids])
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _map_chunks(function: Callable[[Sequence[int]], Any], ids: Sequence[int], num_workers: int | None) -> Iterator[Any]:
    """Results of `function` on consecutive chunks of `ids`, in order, from a pool of processes when it pays."""
    num_workers = num_workers or len(os.sched_getaffinity(0))
    chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
    if num_workers == 1 or len(ids) < IN_PROCESS_LIMIT:
        yield from map(function, chunks)
        return
    with process_pool(num_workers) as pool:
        yield from pool.map(function, chunks)
