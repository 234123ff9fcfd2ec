"""The interface of every source of encoded pictures, and the order of samples that all of them share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from sendvae_fast.errors import UserError

MAX_CLASSES = 2**20
"""A class number beyond it is taken for a mistake, before names are made for all classes below it."""


class Source(ABC):
    """Encoded pictures, numbered. Safe to read from many threads; pickles without its open files."""

    kind: ClassVar[str]
    """The name of this kind of source in a catalog file."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of one sample.

        Raises:
            UnreadableImage: when they cannot be read.
        """

    @abstractmethod
    def locate(self, index: int) -> str:
        """Where a sample lies, for messages."""

    @abstractmethod
    def take(self, indices: np.ndarray) -> "Source":
        """The samples `indices` int64 [n], in that order, as a source of their own."""

    @abstractmethod
    def reading_order(self) -> np.ndarray:
        """All indices, int64 [n], in the order in which the storage is read fastest."""

    def __reduce__(self) -> tuple:
        return type(self), self._arguments()

    @abstractmethod
    def _arguments(self) -> tuple:
        """The constructor's arguments: all of a source except its open files."""


class ShardedSource(Source):
    """Many samples per file: sample i is the one at `offset[i]` (a byte, or a row) of `files[file[i]]`."""

    def __init__(
        self, root: Path, names: list[str], files: list[str], file: np.ndarray, offset: np.ndarray, size: np.ndarray
    ) -> None:
        """`files` are paths under `root`; file int32, offset int64, size int64 [n] (in bytes; -1 where unknown)."""
        super().__init__(root, names)
        self.files, self.file, self.offset, self.size = files, file, offset, size

    def take(self, indices: np.ndarray) -> "ShardedSource":
        names = [self.names[i] for i in indices]
        return type(self)(self.root, names, self.files, self.file[indices], self.offset[indices], self.size[indices])

    def reading_order(self) -> np.ndarray:
        return np.lexsort((self.offset, self.file))

    def shard_path(self, index: int) -> Path:
        """The file that holds a sample."""
        return self.root / self.files[self.file[index]]

    def _arguments(self) -> tuple:
        return self.root, self.names, self.files, self.file, self.offset, self.size


@dataclass(frozen=True)
class Listing:
    """The samples of a source in order, and their classes, as far as names tell them."""

    source: Source
    labels: np.ndarray
    """Class index of each sample, int64 [num_samples]."""
    class_names: tuple[str, ...]
    damage: tuple[str, ...] = ()
    """Files of which a part cannot be read, one line each."""
    passed_over: tuple[str, ...] = ()
    """Entries left out on purpose, one line each."""


def index_classes(classes: Sequence[str | int], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 [n] and class names from the samples' classes: names are sorted, numbers keep their value.

    Raises:
        UserError: when names and numbers are mixed, or a number cannot be a class.
    """
    kinds = {type(item) for item in classes}
    if kinds == {int}:
        numbers = [item for item in classes if isinstance(item, int)]
        lowest, highest = min(numbers), max(numbers)
        if lowest < 0 or highest >= MAX_CLASSES:
            wrong = lowest if lowest < 0 else highest
            raise UserError(f"{where}: a sample has the class number {wrong}; give a source with labels from 0 on")
        return np.array(numbers, np.int64), tuple(str(number) for number in range(highest + 1))
    if kinds - {str}:
        raise UserError(f"{where}: some classes are names and some are numbers; correct the labels")
    names = [item for item in classes if isinstance(item, str)]
    class_names = tuple(sorted(set(names)))
    number = {name: index for index, name in enumerate(class_names)}
    return np.array([number[name] for name in names], np.int64), class_names


def sample_order(labels: np.ndarray, names: list[str]) -> np.ndarray:
    """The order of sample ids in every kind of source: by class, folder and file name; int64 [n]."""
    return np.array(sorted(range(len(names)), key=lambda i: (labels[i], *os.path.split(names[i]))), np.int64)


def common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all of `paths`."""
    return Path(os.path.commonpath([path.parent for path in paths]))
