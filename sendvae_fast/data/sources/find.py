"""The samples that a user's path or pattern stands for."""

import os
from pathlib import Path

from sendvae_fast.data.sources.base import Listing
from sendvae_fast.data.sources.folder import FolderSource, list_folder, visible_entries
from sendvae_fast.data.sources.parquet import ParquetSource, list_parquet
from sendvae_fast.data.sources.shards import expand, is_pattern, shards_in
from sendvae_fast.data.sources.tar import TarSource, list_tars
from sendvae_fast.errors import UserError

SOURCES = {source.kind: source for source in (FolderSource, TarSource, ParquetSource)}
LISTS = {".tar": list_tars, ".parquet": list_parquet}
HUGGING_FACE_FOLDER = "data"


def list_source(where: str | os.PathLike[str], label: str | None = None) -> Listing:
    """List the pictures at `where`: an ImageFolder, tar shards or parquet files (one, a folder of them, or a pattern).

    Args:
        where: a path, or a pattern such as `shards/train-{000..127}.tar` or `data/train-*.parquet`.
        label: where classes come from; see `list_tars` and `list_parquet`. Not for folders.

    Raises:
        UserError: when there is nothing, or something is wrong with how it is laid out.
    """
    shards = expand(str(where)) if is_pattern(str(where)) else _shards_at(Path(where))
    if shards is None:
        if label is not None:
            raise UserError(f"{where}: the classes of a folder of pictures are its folders; leave label={label!r} out")
        return list_folder(where)
    suffixes = {path.suffix for path in shards}
    if len(suffixes) != 1 or not LISTS.keys() >= suffixes:
        found = f"names files that end with {', '.join(sorted(suffixes))}" if is_pattern(str(where)) else "is a file"
        raise UserError(f"{where} {found}; give a folder of pictures, tar shards (not compressed) or parquet files")
    return LISTS[suffixes.pop()](shards, label)


def _shards_at(path: Path) -> list[Path] | None:
    """The shards that a file is or a folder holds; None for a folder of pictures or nothing at all.

    An archive left lying beside class folders is no shard.
    """
    if path.is_file():
        return [path]
    folders = {entry.name for entry in visible_entries(path) if entry.is_dir()} if path.is_dir() else None
    if folders is None or folders - {HUGGING_FACE_FOLDER}:
        return None
    found = [shards_in(path / HUGGING_FACE_FOLDER if folders else path, suffix) for suffix in LISTS]
    return next((shards for shards in found if shards), None)
