"""What every source of encoded pictures offers, and the order of samples that all of them share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np


class Source(ABC):
    """Encoded pictures, numbered. Safe to read from many threads; pickles without its open files."""

    kind: ClassVar[str]
    """What a catalog file calls it."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of one sample.

        Raises:
            UnreadableImage: when they cannot be had.
        """

    @abstractmethod
    def locate(self, index: int) -> str:
        """Where a sample lies, for messages."""

    @abstractmethod
    def take(self, indices: np.ndarray) -> "Source":
        """The samples `indices` int64 [n], in that order, as a source of their own."""


@dataclass(frozen=True)
class Listing:
    """What a look at the names in a source says: the samples in order, and their classes."""

    source: Source
    labels: np.ndarray
    """Class index of each sample, int64 [num_samples]."""
    class_names: tuple[str, ...]
    problems: tuple[str, ...] = field(default=())
    """Parts of the source that are damaged or were passed over, one line each."""


def class_indices(classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 [n] of samples by their class's name, and the names sorted."""
    class_names = tuple(sorted(set(classes)))
    index = {name: number for number, name in enumerate(class_names)}
    return np.array([index[name] for name in classes], np.int64), class_names


def sample_order(labels: np.ndarray, names: list[str]) -> np.ndarray:
    """The order of sample ids, whatever holds them: by class, folder and file name; int64 [n]."""
    ranks = sorted(range(len(names)), key=lambda i: (labels[i], *os.path.split(names[i])))
    return np.array(ranks, np.int64)
