"""Parquet files as the Hugging Face `datasets` library writes them: `image` struct<bytes, path>, `label` int64."""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc  # makes its functions when it is imported, so that pyright knows none of them
import pyarrow.parquet as pq

from sendvae_fast.data.arrow_files import open_for_arrow
from sendvae_fast.data.decode import UnreadableImage, failure_reason
from sendvae_fast.data.sources.base import Listing, ShardedSource, common_folder, index_classes, sample_order
from sendvae_fast.errors import UserError
from sendvae_fast.reading import reading

MAX_CACHE_BYTES = 2**28
MAX_ROW_GROUP_BYTES = 2**30
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
LABEL_OPTIONS = "column:NAME or none"


class ParquetSource(ShardedSource):
    """Rows of parquet files; a row's group is read as a whole and kept while there is room.

    Meant for a look at a downloaded set and for packing it: reading at random costs a row group per picture.
    """

    kind = "parquet"

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._readers: dict[int, tuple[pq.ParquetFile, np.ndarray]] = {}  # with the first row of every group
        self._groups: dict[tuple[int, int], pa.ChunkedArray] = {}  # by file and row group, the last used at the end
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        try:
            with self._lock:
                picture = self._picture(int(self.file[index]), int(self.offset[index])).as_py()
            if picture is None:
                raise ValueError("the row holds no bytes")
        except (OSError, ValueError, IndexError, KeyError, pa.ArrowException) as error:
            with self._lock:
                self._readers.pop(int(self.file[index]), None)  # a file server that was away knows of no open file
            raise UnreadableImage(self.locate(index), failure_reason(error)) from error
        return picture

    def locate(self, index: int) -> str:
        return f"{self.shard_path(index)} ({self.names[index]!r} in row {self.offset[index]})"

    def _picture(self, file: int, row: int) -> pa.Scalar:
        if file not in self._readers:
            reader = pq.ParquetFile(open_for_arrow(self.root / self.files[file]))
            self._readers[file] = reader, np.cumsum([0, *_row_group_sizes(reader)])
        reader, first_rows = self._readers[file]
        group = int(np.searchsorted(first_rows, row, side="right")) - 1
        pictures = self._groups.pop((file, group), None)
        if pictures is None:
            column = _image_column(reader.schema_arrow, self.files[file])
            table = reader.read_row_group(group, columns=[f"{column}.bytes"], use_threads=False)
            pictures = pc.struct_field(table[column], "bytes")  # pyright: ignore[reportAttributeAccessIssue]
        self._groups[file, group] = pictures
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > MAX_CACHE_BYTES:
            del self._groups[next(iter(self._groups))]
        return pictures[row - int(first_rows[group])]


def list_parquet(files: Sequence[Path], label: str | None = None) -> Listing:
    """List the rows of parquet files by their labels and paths, without their pictures.

    Args:
        files: their paths.
        label: where the class of a row comes from: "column:NAME" or "none" (one class). By default the column `label`,
            if there is one. Numbers get the names that the file's Hugging Face metadata has for them.

    Raises:
        UserError: when a file is broken, has no image column or no such label, or row groups too large to read.
    """
    root = common_folder(files)
    names: list[str] = []
    classes: list[str | int] = []
    rows_per_file = []
    class_names: list[str] | None = None
    for path in files:
        with reading(path, "fetch it again"):
            reader = _open(path)
            image = _image_column(reader.schema_arrow, str(path))
            column = _label_column(reader.schema_arrow, path, label)
            class_names = class_names or _class_label_names(reader.schema_arrow, column)
            try:
                table = reader.read(columns=[f"{image}.path", *([column] if column else [])])
            except (OSError, MemoryError, pa.ArrowException) as error:
                raise UserError(f"cannot read {path}: {failure_reason(error)}; fetch it again") from error
            paths = pc.struct_field(table[image], "path").to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
            names += [os.path.basename(name or "") or f"{path.stem}/{row:06d}" for row, name in enumerate(paths)]
            classes += table[column].to_pylist() if column else [root.resolve().name] * len(paths)
            rows_per_file.append(len(paths))
    if not names:
        raise UserError(f"there are no rows in the parquet files {files[0]} ...; fetch them again")
    labels, numbered = index_classes(classes, str(root))
    if class_names and len(class_names) < len(numbered):
        raise UserError(
            f"{root}: a row has the label {len(numbered) - 1}, but there are {len(class_names)} class names; "
            "fetch the files again"
        )
    rows = np.concatenate([np.arange(count, dtype=np.int64) for count in rows_per_file])
    file = np.repeat(np.arange(len(files), dtype=np.int32), rows_per_file)
    source = ParquetSource(
        root, names, [path.relative_to(root).as_posix() for path in files], file, rows, np.full(len(rows), -1, np.int64)
    )
    order = sample_order(labels, names)
    return Listing(source.take(order), labels[order], tuple(class_names or numbered))


def _open(path: Path) -> pq.ParquetFile:
    try:
        reader = pq.ParquetFile(open_for_arrow(path))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as parquet: {failure_reason(error)}; fetch it again") from error
    metadata = reader.metadata
    largest = max((metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups)), default=0)
    if largest > MAX_ROW_GROUP_BYTES:
        raise UserError(
            f"{path} has row groups of up to {largest} bytes, too many to read for one picture; write it again with "
            "row_group_size=100"
        )
    return reader


def _row_group_sizes(reader: pq.ParquetFile) -> list[int]:
    return [reader.metadata.row_group(group).num_rows for group in range(reader.metadata.num_row_groups)]


def _image_column(schema: pa.Schema, where: str) -> str:
    for name in IMAGE_COLUMNS:
        kind = schema.field(name).type if name in schema.names else pa.null()
        if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
            return name
    raise UserError(
        f"{where} has no column {' or '.join(IMAGE_COLUMNS)} of struct<bytes, path>, but {', '.join(schema.names)}; "
        "give parquet files of pictures, as `datasets` writes them"
    )


def _label_column(schema: pa.Schema, path: Path, label: str | None) -> str | None:
    if label is None:
        return LABEL_COLUMN if LABEL_COLUMN in schema.names else None
    kind, _, name = label.partition(":")
    if label == "none":
        return None
    if kind != "column" or name not in schema.names:
        raise UserError(
            f"label={label!r} is not a place for labels in {path}; give {LABEL_OPTIONS}, "
            f"where NAME is one of {', '.join(schema.names)}"
        )
    return name


def _class_label_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """The names of a `ClassLabel` feature, in the order of their numbers; None where the metadata has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
        return names if all(isinstance(name, str) for name in names) else None
    except (KeyError, TypeError, ValueError):
        return None
