"""Pictures to measure, batch by batch from wherever they are: a catalog, a folder of samples, an npz.

Shape letters: B batch, S picture size.
"""

from __future__ import annotations

import hashlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import decode_rgb
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.origins import catalog_origin
from sendvae_fast.evaluation.result import PicturesOrigin
from sendvae_fast.files import file_sha256
from sendvae_fast.reading import NotOfItsKind, reading_zip

PICTURES_KEY = "arr_0"
"""In an npz of the ADM evaluator: uint8 [N, S, S, 3]."""
NUM_LOOKED_AT = 8
_REMEDY = f"give an npz of pictures, uint8 [N, S, S, 3] named {PICTURES_KEY}"


class Pictures(ABC):
    """A numbered set of square pictures of one size."""

    origin: PicturesOrigin

    def __len__(self) -> int:
        return self.origin.num_pictures

    @property
    def identity(self) -> str:
        """What tells these pictures from all others on this machine: what is computed of them is kept under it."""
        return self.origin.sha256

    @abstractmethod
    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Pictures start .. stop - 1 (default: all) in order: uint8 [<= batch_size, 3, S, S] each, any device."""


class CatalogPictures(Pictures):
    """The ADM centre crops of a catalog. An unreadable picture is an error: a number must be of what it says."""

    def __init__(self, catalog: Catalog, image_size: int, num_threads: int = 4) -> None:
        self.catalog, self.origin = catalog, catalog_origin(catalog, image_size)
        config = LoaderConfig(cache_mb=0, max_bad_fraction=0, num_threads=num_threads, decoder="pillow")
        self._loader = ImageLoader(catalog, image_size, config)

    @property
    def identity(self) -> str:
        """Two folders may have the same names: without an index files are told by place, size and time."""
        if self.origin.hash_of == "contents":
            return self.origin.sha256
        root = self.catalog.root.resolve()
        is_folder = self.catalog.source.kind == "folder"
        files = [root / name for name in self.catalog.names] if is_folder else sorted(root.iterdir())
        facts = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(f"{root} {self.origin.sha256} {facts}".encode(errors="surrogateescape")).hexdigest()

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        for batch in self._loader.in_order(batch_size, start=start, stop=stop):
            yield batch.images


class NpzPictures(Pictures):
    """The pictures of an npz as the ADM evaluator takes it, read as they are asked for.

    Raises UserError if the file is not there, is no npz, or has no uint8 [N, S, S, 3] under `PICTURES_KEY`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading_zip(path, _REMEDY), self._open() as file:
            shape, fortran, dtype = _npy_header(file)
            self._data_start = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or fortran:
            raise UserError(
                f"{path}: {PICTURES_KEY} is {dtype} {list(shape)}; give pictures as uint8 [N, S, S, 3] in C order"
            )
        if shape[0] < 1:
            raise UserError(f"{path} has no pictures in it")
        self.origin = PicturesOrigin(
            path=str(path),
            num_pictures=shape[0],
            image_size=shape[1],
            sha256=file_sha256(path),
            hash_of="contents",
        )

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        stop, size = len(self) if stop is None else stop, self.origin.image_size
        with self._open() as file:
            file.seek(self._data_start + start * 3 * size**2)
            for first in range(start, stop, batch_size):
                num = min(batch_size, stop - first)
                with reading_zip(self.path, _REMEDY):
                    data = file.read(num * 3 * size**2)
                if len(data) != num * 3 * size**2:
                    raise UserError(
                        f"{self.path} ends after picture {first + len(data) // (3 * size**2)}; write it again"
                    )
                pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                yield pixels.reshape(num, size, size, 3).permute(0, 3, 1, 2).contiguous()

    def _open(self):
        with reading_zip(self.path, _REMEDY):
            archive = zipfile.ZipFile(self.path)
            if f"{PICTURES_KEY}.npy" not in archive.namelist():
                raise NotOfItsKind(f"no {PICTURES_KEY} in it")
            return archive.open(f"{PICTURES_KEY}.npy")


def open_pictures(where: str | Path, image_size: int | None = None) -> Pictures:
    """The pictures at `where`: an npz, or anything that `Catalog.open` takes.

    Args:
        where: a file or a folder.
        image_size: side of the centre crop; without it the pictures must be square, of one size, and stay as they are.

    Raises:
        UserError: there are none, or they are of another size.
    """
    path = Path(where)
    if path.suffix == ".npz":
        pictures = NpzPictures(path)
        if image_size not in (None, pictures.origin.image_size):
            size = pictures.origin.image_size
            raise UserError(f"{path} has pictures of {size} pixels, not {image_size}: compare pictures of one size")
        return pictures
    catalog = Catalog.open(path)
    return CatalogPictures(catalog, _common_size(catalog) if image_size is None else image_size)


def npz_keys(where: str | Path) -> set[str] | None:
    """The names of the arrays in an npz; None for what is none by its name. Raises UserError if it cannot be read."""
    path = Path(where)
    if path.suffix != ".npz":
        return None
    with reading_zip(path, "give another --reference"), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _common_size(catalog: Catalog) -> int:
    """The side of all pictures, as far as some from all over the catalog tell."""
    sizes = {}
    for index in np.linspace(0, len(catalog) - 1, min(NUM_LOOKED_AT, len(catalog))).astype(int).tolist():
        picture = decode_rgb(catalog.read(index), catalog.locate(index))
        sizes.setdefault(picture.size, catalog.locate(index))
    (width, height), where = next(iter(sizes.items()))
    if len(sizes) > 1 or width != height:
        others = ", ".join(f"{size[0]} x {size[1]}" for size in sizes)
        raise UserError(f"pictures of {catalog.root} are not square and of one size ({others}; {where})")
    return width


def _npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) of an open .npy, which is then at its data."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
