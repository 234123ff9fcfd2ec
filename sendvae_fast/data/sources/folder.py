"""An ImageFolder: one folder per class, one file per picture."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sendvae_fast.data.decode import FORMAT_OF_EXTENSION, read_encoded
from sendvae_fast.data.sources.base import Listing, Source
from sendvae_fast.errors import UserError

EXTENSIONS = tuple(FORMAT_OF_EXTENSION)
SPLITS = {"train", "val", "validation", "test"}


class FolderSource(Source):
    """Files under a root; a name is a path relative to it."""

    kind = "folder"

    def read(self, index: int) -> bytes:
        return read_encoded(self.locate(index))

    def locate(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def take(self, indices: np.ndarray) -> "FolderSource":
        return FolderSource(self.root, [self.names[i] for i in indices])

    def reading_order(self) -> np.ndarray:
        return np.arange(len(self))

    def _arguments(self) -> tuple:
        return self.root, self.names


def list_folder(root: str | os.PathLike[str]) -> Listing:
    """List an ImageFolder (`root/<class>/.../<image>`); a flat folder of images counts as one class.

    A folder of splits (`root/train/<class>/...`, perhaps with `val` beside it) stands for its `train`. Names that begin
    with a dot are passed over.

    Raises:
        UserError: when the folder is missing, holds no images, or has a class without images.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"the image folder {root} does not exist; check the path")
    if not root.is_dir():
        raise UserError(f"{root} is a file, not an image folder; give the folder that holds the class folders")
    class_names = _folders_in(root)
    if "train" in class_names and SPLITS.issuperset(class_names) and _folders_in(root / "train"):
        root = root / "train"
        class_names = _folders_in(root)
    if class_names:
        per_class = [_images_under(root, name) for name in class_names]
    else:
        class_names, per_class = (root.resolve().name,), [_images_under(root, "")]
    names = [name for class_files in per_class for name in class_files]
    if not names:
        raise UserError(
            f"there are no images in {root}; expected {root}/<class>/<image> with one of {', '.join(EXTENSIONS)}"
        )
    for name, class_files in zip(class_names, per_class, strict=True):
        if not class_files:
            raise UserError(f"the class folder {root / name} holds no images; remove it or fill it")
    labels = np.repeat(np.arange(len(class_names), dtype=np.int64), [len(files) for files in per_class])
    return Listing(FolderSource(root, names), labels, class_names)


def _folders_in(root: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in visible_entries(root) if entry.is_dir()))


def visible_entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder whose names do not begin with a dot."""
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _images_under(root: Path, folder: str) -> list[str]:
    """Paths relative to `root` of the images anywhere under `folder`, folder by folder as torchvision sorts them."""
    found: list[tuple[str, str]] = []
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        for entry in visible_entries(root / here):
            if entry.is_dir():
                waiting.append(os.path.join(here, entry.name))
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append((here, entry.name))
    return [os.path.join(*pair) for pair in sorted(found)]
