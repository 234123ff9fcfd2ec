"""The catalog of pictures: the samples of a source with their classes and, where known, attributes and verdicts."""

import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from sendvae_fast.data.attributes import Attributes, read_attributes
from sendvae_fast.data.catalog_file import is_catalog_file, read_catalog_file, write_catalog_file
from sendvae_fast.data.sources.base import Listing, Source
from sendvae_fast.data.sources.find import list_source
from sendvae_fast.data.sources.shards import CATALOG_NAME
from sendvae_fast.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Catalog:
    """The samples of a source, numbered by sample ids in the order of classes, then of names."""

    listing: Listing
    attributes: Attributes | None = None
    """From `attributes.csv` in the root, where there is one."""
    facts: pa.Table | None = None
    """What `sendvae data index` found out, a row of `catalog_file.FACTS` per sample; None without an index."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def source(self) -> Source:
        """Where the encoded pictures lie."""
        return self.listing.source

    @property
    def root(self) -> Path:
        """Folder of the source."""
        return self.source.root

    @property
    def names(self) -> list[str]:
        """Name of each sample, with forward slashes; in a folder its path under the root."""
        return self.source.names

    @property
    def labels(self) -> np.ndarray:
        """Class index of each sample, int64 [num_samples]."""
        return self.listing.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class index. Where classes have names and no numbers, they are sorted, as ImageFolder does."""
        return self.listing.class_names

    @cached_property
    def verdicts(self) -> np.ndarray | None:
        """Verdicts "ok", "odd: <why>", "bad: <reason>", str objects [num_samples]; None without an index."""
        if self.facts is None:
            return None
        column = self.facts["verdict"].combine_chunks().dictionary_encode()
        return np.array(column.dictionary.to_pylist(), object)[column.indices.to_numpy()]

    @cached_property
    def is_bad(self) -> np.ndarray:
        """Which samples are known to be unreadable, bool [num_samples]; without an index none is."""
        if self.verdicts is None:
            return np.zeros(len(self), bool)
        return np.array([verdict.startswith("bad") for verdict in self.verdicts], bool)

    def read(self, sample_id: int) -> bytes:
        """The encoded bytes of a sample. May be called from many threads.

        Raises:
            UnreadableImage: when they cannot be read.
        """
        return self.source.read(sample_id)

    def locate(self, sample_id: int) -> str:
        """Where a sample lies, for messages."""
        return self.source.locate(sample_id)

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> "Catalog":
        """The catalog of the pictures at `where`.

        Args:
            where: a catalog file, or what `list_source` takes: an ImageFolder, tar shards, parquet files.

        Raises:
            UserError: when there are no pictures, something is wrong with how they are laid out, or a shard that was
                never indexed is damaged.
        """
        path = catalog_file_at(where)
        if path is not None:
            return cls._of_listing(*read_catalog_file(path))
        listing = list_source(where)
        if listing.damage:
            raise UserError(
                f"{listing.damage[0]} ({len(listing.damage)} damaged); fetch it again, "
                "or catalog what is left of it with `sendvae data index`"
            )
        for line in listing.passed_over:
            logger.warning(line)
        return cls._of_listing(listing)

    @classmethod
    def _of_listing(cls, listing: Listing, facts: pa.Table | None = None) -> "Catalog":
        return cls(listing, read_attributes(listing.source.root, listing.source.names), facts)

    def subset(self, ids: np.ndarray) -> "Catalog":
        """The samples `ids` int64 [n], in that order, with the same classes."""
        return Catalog(
            listing=replace(self.listing, source=self.source.take(ids), labels=self.labels[ids]),
            attributes=self.attributes and replace(self.attributes, values=self.attributes.values[ids]),
            facts=self.facts and self.facts.take(pa.array(ids)),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a catalog file that `open` reads. Attributes stay where they are: in the source's root."""
        write_catalog_file(Path(path), self.listing, self.facts)


def catalog_file_at(where: str | os.PathLike[str]) -> Path | None:
    """The catalog file that `where` is, or that lies in the folder of shards `where`; None when there is none."""
    path = Path(where)
    path = path / CATALOG_NAME if path.is_dir() else path
    return path if path.suffix == ".parquet" and is_catalog_file(path) else None
