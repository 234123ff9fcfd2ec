"""Files that are either the old ones or the new ones after a crash, never something between."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sendvae_fast.errors import UserError


def fsync_path(path: Path) -> None:
    """Flush a file or a directory (its list of names) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path to write to; what is there takes the place of `path` when the block ends without an error."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        yield unfinished
        fsync_path(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)
    fsync_path(path.parent)


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """A new directory to write files to, which becomes `path` when the block ends without an error.

    Raises:
        UserError: `path` exists (nothing is ever overwritten), or cannot be made.
    """
    if path.exists():
        raise UserError(f"{path} exists already: choose another folder, or remove it first")
    unfinished = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): choose another place") from error
    try:
        yield unfinished
        for file in unfinished.iterdir():
            fsync_path(file)
        fsync_path(unfinished)
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    fsync_path(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`: a reader, or a crash, sees the old file or the new one."""
    with staged(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
