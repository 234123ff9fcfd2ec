"""What pictures there are: the samples of a source with their classes and, where known, attributes and verdicts."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sendvae_fast.data.attributes import Attributes, read_attributes
from sendvae_fast.data.sources.base import Listing, Source
from sendvae_fast.data.sources.folder import list_folder


@dataclass(frozen=True)
class Catalog:
    """The samples of a source. A sample id counts them: by class, then by name."""

    source: Source
    labels: np.ndarray
    """Class index of each sample, int64 [num_samples]."""
    class_names: tuple[str, ...]
    """Sorted, as ImageFolder sorts them."""
    attributes: Attributes | None = None
    """From `attributes.csv` in the root, where there is one."""
    verdicts: np.ndarray | None = None
    """What `sendvae data index` found, str [num_samples]: "ok", "odd: <why>", "bad: <reason>"; None: no index."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def root(self) -> Path:
        """Folder of the source."""
        return self.source.root

    @property
    def names(self) -> list[str]:
        """Name of each sample, with forward slashes; in a folder its path under the root."""
        return self.source.names

    @property
    def is_bad(self) -> np.ndarray:
        """Which samples are known to be unreadable, bool [num_samples]; without an index none is."""
        if self.verdicts is None:
            return np.zeros(len(self), bool)
        return np.array([verdict.startswith("bad") for verdict in self.verdicts], bool)

    def read(self, sample_id: int) -> bytes:
        """The encoded bytes of a sample. May be called from many threads.

        Raises:
            UnreadableImage: when they cannot be had.
        """
        return self.source.read(sample_id)

    def locate(self, sample_id: int) -> str:
        """Where a sample lies, for messages."""
        return self.source.locate(sample_id)

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> "Catalog":
        """The catalog of the pictures at `where`: an ImageFolder.

        Raises:
            UserError: when there are none, or something is wrong with how they are laid out.
        """
        return cls.from_folder(where)

    @classmethod
    def from_folder(cls, root: str | os.PathLike[str]) -> "Catalog":
        """List an ImageFolder by names alone, so that a million files take seconds.

        Raises:
            UserError: as `list_folder`, or when its `attributes.csv` does not fit.
        """
        return cls._of_listing(list_folder(root))

    @classmethod
    def _of_listing(cls, listing: Listing) -> "Catalog":
        source = listing.source
        return cls(source, listing.labels, listing.class_names, read_attributes(source.root, source.names))

    def subset(self, ids: np.ndarray) -> "Catalog":
        """The samples `ids` int64 [n], in that order, with the same classes."""
        attributes = self.attributes and replace(self.attributes, values=self.attributes.values[ids])
        verdicts = None if self.verdicts is None else self.verdicts[ids]
        return replace(
            self, source=self.source.take(ids), labels=self.labels[ids], attributes=attributes, verdicts=verdicts
        )
