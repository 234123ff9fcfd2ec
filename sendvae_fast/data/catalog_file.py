"""A catalog on disk: one parquet file with a row per sample id.

    name     binary       the name's bytes, as the file system has them
    label    int64        class index
    file     int32        index into `files` (shards only, else null)
    offset   int64        first byte in the tar, or row of the parquet file (else null)
    size     int64        encoded bytes
    sha256   binary(32)   of the encoded bytes
    width, height int32, mode, format string             of the picture; 0 and "" where it is bad
    verdict  string       "ok", "odd: <why>", "bad: <reason>"

The columns from `sha256` on are null in a catalog that was never indexed. The schema's metadata holds under `sendvae`
as JSON: schema_version, kind, root (relative to the catalog's folder when it lies there, so that both may move
together), files, class_names, damaged and passed-over files, and the `origin` of the catalog.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sendvae_fast.data.arrow_files import create_for_arrow, open_for_arrow
from sendvae_fast.data.sources.base import Listing, ShardedSource
from sendvae_fast.data.sources.find import SOURCES
from sendvae_fast.errors import UserError
from sendvae_fast.files import staged
from sendvae_fast.reading import NotOfItsKind, reading

SCHEMA_VERSION = 1
METADATA_KEY = b"sendvae"
FACTS = pa.schema(
    [
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.string()),
        ("format", pa.string()),
        ("verdict", pa.string()),
    ]
)
"""What `sendvae data index` finds out about a sample."""
LOCATION = pa.schema(
    [
        ("name", pa.binary()),
        ("label", pa.int64()),
        ("file", pa.int32()),
        ("offset", pa.int64()),
    ]
)


def is_catalog_file(path: Path) -> bool:
    """Whether a file is a catalog, and not parquet of another kind or something else."""
    try:
        with open_for_arrow(path) as file:
            return METADATA_KEY in (pq.read_schema(file).metadata or {})
    except (OSError, pa.ArrowException, ValueError, MemoryError):
        return False


def write_catalog_file(path: Path, listing: Listing, facts: pa.Table | None, origin: dict | None = None) -> None:
    """Write what `read_catalog_file` reads, whole or not at all.

    Args:
        facts: one row of `FACTS` per sample, None without an index.
        origin: JSON values that say what the catalog was made from and how; see `read_origin`.
    """
    source, path = listing.source, path.absolute()
    sharded = isinstance(source, ShardedSource)
    nulls = [None] * len(source)
    columns = {
        "name": [os.fsencode(name) for name in source.names],
        "label": listing.labels,
        "file": source.file if sharded else nulls,
        "offset": source.offset if sharded else nulls,
    }
    known = facts
    if known is None:
        known = pa.Table.from_pydict({field.name: pa.nulls(len(source), field.type) for field in FACTS}, FACTS)
        if sharded:
            known = known.set_column(0, FACTS.field("size"), pa.array(source.size))
    root = source.root.absolute()
    note = {
        "schema_version": SCHEMA_VERSION,
        "kind": source.kind,
        "root": str(root.relative_to(path.parent) if root.is_relative_to(path.parent) else root),
        "files": source.files if sharded else [],
        "class_names": listing.class_names,
        "damage": listing.damage,
        "passed_over": listing.passed_over,
        "origin": origin,
    }
    table = pa.table([pa.array(columns[field.name], field.type) for field in LOCATION], schema=LOCATION)
    for field in FACTS:
        table = table.append_column(field, known[field.name])
    with staged(path) as unfinished, create_for_arrow(unfinished) as file:
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(note)}), file)


def read_catalog_file(path: Path) -> tuple[Listing, pa.Table | None]:
    """The samples in a catalog file and the facts about them, None when it was never indexed.

    Raises:
        UserError: when the file is damaged or of another schema version.
    """
    again = "make it again with `sendvae data index`"
    with reading_parquet(path, again):
        with open_for_arrow(path) as file:
            table = pq.read_table(file)
        table.validate(full=True)
        note = json.loads(table.schema.metadata[METADATA_KEY])
        version = note["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; {again}")
        return _listing(table, note, path.absolute().parent), _facts(table)


@contextmanager
def reading_parquet(path: Path, remedy: str) -> Iterator[None]:
    """`reading` of a parquet file, whose library has errors of its own."""
    with reading(path, remedy):
        try:
            yield
        except (pa.ArrowException, MemoryError, OSError) as error:  # memory: a damaged size
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise NotOfItsKind(str(error)) from error


def read_origin(path: Path) -> dict | None:
    """The `origin` of a catalog file; None if it has none or the file is no whole catalog."""
    if not is_catalog_file(path):
        return None
    try:
        with open_for_arrow(path) as file:
            return json.loads(pq.read_schema(file).metadata[METADATA_KEY])["origin"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _listing(table: pa.Table, note: dict, folder: Path) -> Listing:
    kind, root = SOURCES[note["kind"]], folder / note["root"]
    files, class_names, damage, passed_over = (
        _words(note, name) for name in ("files", "class_names", "damage", "passed_over")
    )
    names = [os.fsdecode(name) for name in table["name"].to_pylist()]
    if issubclass(kind, ShardedSource):
        file = _numbers(table, "file", len(files), np.int32)
        offset = _numbers(table, "offset", 2**63 - 1, np.int64)
        source = kind(root, names, files, file, offset, table["size"].fill_null(-1).to_numpy())
    else:
        source = kind(root, names)
    labels = _numbers(table, "label", len(class_names), np.int64)
    return Listing(source, labels, tuple(class_names), tuple(damage), tuple(passed_over))


def _words(note: dict, name: str) -> list[str]:
    if not isinstance(note[name], list) or not all(isinstance(word, str) for word in note[name]):
        raise NotOfItsKind(f"{name} is no list of words")
    return note[name]


def _numbers(table: pa.Table, name: str, end: int, dtype: type) -> np.ndarray:
    """A column of indices in [0, end)."""
    column = table[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise NotOfItsKind(f"{name} is missing, or no number, in some rows")
    numbers = column.to_numpy().astype(dtype)
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < end:
        raise NotOfItsKind(f"{name} is {numbers.min()} to {numbers.max()} and should be from 0 to {end - 1}")
    return numbers


def _facts(table: pa.Table) -> pa.Table | None:
    return table.select(FACTS.names).cast(FACTS) if table["verdict"].null_count == 0 else None
