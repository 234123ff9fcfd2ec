"""The samples of a listing in parts, so that their examination can be interrupted: finished parts stay on disk.

<folder>/origin.json     the job; another one must not continue here
<folder>/part-00000.parquet ...   rows of `catalog_file.FACTS`, whole files only
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sendvae_fast.data.arrow_files import create_for_arrow, open_for_arrow
from sendvae_fast.data.catalog_file import FACTS, reading_parquet
from sendvae_fast.data.indexing.sandbox import SampleFacts
from sendvae_fast.data.sources.base import Listing, ShardedSource
from sendvae_fast.errors import UserError
from sendvae_fast.files import staged, write_atomic
from sendvae_fast.reading import NotOfItsKind, read_json

ORIGIN_FILE = "origin.json"


class ListingParts:
    """Parts of `part_size` samples each, in the order in which the storage is read fastest.

    Raises:
        UserError: when `folder` cannot be made, or was made for another `origin`.
    """

    def __init__(self, folder: Path, listing: Listing, part_size: int, origin: dict[str, Any]) -> None:
        self.folder, self.part_size = folder, part_size
        self._order = listing.source.reading_order()
        self.count = -(-len(self._order) // part_size)
        note = folder / ORIGIN_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not note.exists():
                write_atomic(note, json.dumps(origin))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; give another --out") from error
        if read_json(note, f"remove the folder {folder} and run the same command again") != origin:
            raise UserError(
                f"{folder} is of an interrupted command on other samples or with other options; finish that one, "
                "or remove the folder"
            )

    def ids(self, number: int) -> np.ndarray:
        """Sample ids of a part, int64 [part_size or less]."""
        return self._order[number * self.part_size : (number + 1) * self.part_size]

    def missing(self) -> list[int]:
        """Numbers of the parts that are not done."""
        return [number for number in range(self.count) if not self._path(number).exists()]

    def num_done(self) -> int:
        """Samples in the parts that are done."""
        return len(self._order) - sum(len(self.ids(number)) for number in self.missing())

    def write(self, number: int, facts: Sequence[SampleFacts]) -> None:
        """Write the facts about the samples of a part, which is then done."""
        columns = [pa.array(column, field.type) for column, field in zip(zip(*facts, strict=True), FACTS, strict=True)]
        with staged(self._path(number)) as unfinished, create_for_arrow(unfinished) as file:
            pq.write_table(pa.table(columns, schema=FACTS), file)

    def collect(self) -> pa.Table:
        """The facts about all samples, by id; all parts must be done. UserError where one is damaged."""
        facts = pa.concat_tables([self._read(number) for number in range(self.count)])
        return facts.take(pa.array(np.argsort(self._order)))

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _read(self, number: int) -> pa.Table:
        path = self._path(number)
        with reading_parquet(path, "remove it and run the same command again"):
            with open_for_arrow(path) as file:
                facts = pq.read_table(file)
            facts.validate(full=True)
            if facts.schema != FACTS or len(facts) != len(self.ids(number)):
                raise NotOfItsKind(f"{len(facts)} rows of other columns than the {len(self.ids(number))} of this part")
        return facts

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"


def listing_sha256(listing: Listing) -> str:
    """Hash of which samples there are, where they lie and what class they have."""
    source = listing.source
    digest = hashlib.sha256(json.dumps([str(source.root.resolve()), source.kind, listing.class_names]).encode())
    digest.update(b"\0".join(os.fsencode(name) for name in source.names))
    digest.update(listing.labels.tobytes())
    if isinstance(source, ShardedSource):
        digest.update(json.dumps(source.files).encode() + source.file.tobytes() + source.offset.tobytes())
    return digest.hexdigest()
