"""What images there are: an ImageFolder listed once, with its classes and, where known, its attributes."""

import csv
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sendvae_fast.data.images import UnreadableImage, check_header
from sendvae_fast.errors import UserError
from sendvae_fast.progress import Progress

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""File name endings taken for images, whatever their case."""
ATTRIBUTES_FILE = "attributes.csv"
MESSAGE_LIST_LENGTH = 5
"""At most so many file names go into one error message."""
VERIFY_CHUNK = 4096


@dataclass(frozen=True)
class Attributes:
    """Binary attributes of every image of a catalog."""

    names: tuple[str, ...]
    values: np.ndarray
    """bool [num_images, len(names)]."""


@dataclass(frozen=True)
class Catalog:
    """The images under a folder. A sample id is an index into `paths`."""

    root: Path
    paths: list[str]
    """Full path of each image, class by class."""
    labels: np.ndarray
    """Class index of each image, int64 [num_images]."""
    class_names: tuple[str, ...]
    """Names of the class folders, sorted: the ImageFolder convention."""
    attributes: Attributes | None = None
    """From `attributes.csv` in the root, where there is one."""

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def from_folder(cls, root: str | os.PathLike[str]) -> "Catalog":
        """List an ImageFolder (`root/<class>/.../<image>`); a flat folder of images counts as one class.

        Only names are looked at, so that a million files take seconds; `verify` looks inside. Names that begin with a
        dot are passed over.

        Raises:
            UserError: when the folder is missing, holds no images, has a class without images, or its
                `attributes.csv` does not fit.
        """
        root = Path(root)
        if not root.exists():
            raise UserError(f"the image folder {root} does not exist; check the path")
        if not root.is_dir():
            raise UserError(f"{root} is a file, not an image folder; give the folder that holds the class folders")
        class_names = tuple(sorted(entry.name for entry in _entries(root) if entry.is_dir()))
        if class_names:
            per_class = [_images_under(root / name) for name in class_names]
        else:
            class_names, per_class = (root.resolve().name,), [_images_under(root)]
        paths = [path for class_paths in per_class for path in class_paths]
        if not paths:
            raise UserError(
                f"there are no images in {root}; expected {root}/<class>/<image> with one of {', '.join(EXTENSIONS)}"
            )
        for name, class_paths in zip(class_names, per_class, strict=True):
            if not class_paths:
                raise UserError(f"the class folder {root / name} holds no images; remove it or fill it")
        counts = [len(class_paths) for class_paths in per_class]
        labels = np.repeat(np.arange(len(class_names), dtype=np.int64), counts)
        table = root / ATTRIBUTES_FILE
        attributes = _read_attributes(table, root, paths) if table.exists() else None
        return cls(root=root, paths=paths, labels=labels, class_names=class_names, attributes=attributes)

    def verify(self, max_bad_fraction: float = 0.0, num_threads: int = 8) -> list[UnreadableImage]:
        """Read every image's header (not its pixels) and return what is wrong with the unreadable ones.

        Raises:
            UserError: when more than `max_bad_fraction` of the images are unreadable, naming the first of them.
        """
        bad: list[UnreadableImage] = []
        with ThreadPoolExecutor(num_threads) as pool, Progress("checking images", len(self), unit="image") as progress:
            for verdict in _verdicts(pool, self.paths):
                if verdict is not None:
                    bad.append(verdict)
                progress.advance(1, bad=len(bad))
        if len(bad) > max_bad_fraction * len(self):
            names = ", ".join(error.path for error in bad[:MESSAGE_LIST_LENGTH])
            more = f" and {len(bad) - MESSAGE_LIST_LENGTH} more" if len(bad) > MESSAGE_LIST_LENGTH else ""
            raise UserError(
                f"{len(bad)} of {len(self)} images cannot be read ({bad[0].reason}): {names}{more}; "
                "remove or replace them, or raise data.max_bad_fraction"
            )
        return bad


def _verdicts(pool: ThreadPoolExecutor, paths: list[str]) -> Iterator[UnreadableImage | None]:
    """Header verdicts in order; in chunks, so that a million paths do not become a million waiting futures."""
    for start in range(0, len(paths), VERIFY_CHUNK):
        yield from pool.map(check_header, paths[start:start + VERIFY_CHUNK])


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _images_under(folder: Path) -> list[str]:
    """Paths of the images anywhere under `folder`, sorted folder by folder as torchvision's ImageFolder does."""
    found: list[tuple[str, str]] = []
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        for entry in _entries(here):
            if entry.is_dir():
                waiting.append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append((here, entry.name))
    return [os.path.join(*pair) for pair in sorted(found)]


def _read_attributes(table: Path, root: Path, paths: list[str]) -> Attributes:
    """Read `file` and one 0/1 column per attribute; `file` is relative to the root, with forward slashes."""
    with open(table, newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0][:1] != ["file"] or len(rows[0]) < 2:
        raise UserError(f"{table} must begin with a line 'file,<attribute>,...'; correct or remove it")
    names = tuple(rows[0][1:])
    by_file: dict[str, list[bool]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(names) + 1 or not {"0", "1"}.issuperset(row[1:]):
            raise UserError(f"{table} line {number} must be a file name and {len(names)} values 0 or 1; correct it")
        by_file[row[0]] = [value == "1" for value in row[1:]]
    files = [Path(path).relative_to(root).as_posix() for path in paths]
    missing = [file for file in files if file not in by_file]
    if missing:
        raise UserError(f"{table} has no line for {missing[0]} ({len(missing)} images lack one); add them or remove it")
    return Attributes(names=names, values=np.array([by_file[file] for file in files], bool))
