"""Atomic writing, whole or not at all: the one way in which files are written.

A path holds either the old file or the new one, with the permissions that the user's umask gives to new files. An
unfinished file is called ``.<name>.tmp-<host>-<process>``, so that nobody takes it for the finished one.
"""

import hashlib
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sendvae_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
AUTOENCODER_PART, GENERATOR_PART = "autoencoder", "generator"
"""Folders of weights within a checkpoint of both networks."""
"""In a folder of weights: the sizes and switches of their network."""
_SAFETENSORS_UNFINISHED = ".tmp??????"
"""Names of safetensors' own unfinished files: it does not write directly to the given name either."""


def fsync_path(path: Path) -> None:
    """Flush a file or a directory (its list of names) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write to; its file replaces `path` when the block ends without an error.

    Unfinished files of earlier attempts by killed processes of this machine are removed.

    Args:
        durable: flush the file and its name to the disk, so that it survives a power cut. Without it unfinished files
            of killed processes stay, too: for pictures by the thousand, which are drawn again where they are damaged.

    Raises:
        OSError: the disk is full, the folder missing or not writable. Nothing is left behind then.
    """
    unfinished = path.with_name(f"{_unfinished_prefix(path.name)}{os.getpid()}")
    if durable:
        _remove_left_over(path)
    try:
        with open(unfinished, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield unfinished
        if os.stat(unfinished).st_mode != mode:  # safetensors puts a private file in its place
            os.chmod(unfinished, stat.S_IMODE(mode))
        if durable:
            fsync_path(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            unfinished.unlink(missing_ok=True)
        raise
    if durable:
        fsync_path(path.parent)


@contextmanager
def staged_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`staged`, not durable, for files that a command can make again: makes the folder; a full disk is a UserError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path, durable=False) as unfinished:
            yield unfinished
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path} ({reason}); mend that and run the same command again to go on") from error


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


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Replace `path` by a safetensors file of contiguous `tensors`, whole or not at all.

    Raises:
        OSError, SafetensorError: the disk is full, the folder missing or not writable.
    """
    from safetensors.torch import save_file  # brings torch along, seconds in workers that only write pictures

    with staged(path) as unfinished:
        save_file(dict(tensors), unfinished, metadata=None if metadata is None else dict(metadata))


def unfinished_files(folder: Path) -> list[Path]:
    """The files in `folder` that are being written, or were when their process was killed."""
    found = {*folder.glob(f"{_unfinished_prefix('*', host='*')}*"), *folder.glob(_SAFETENSORS_UNFINISHED)}
    return sorted(path for path in found if path.is_file())


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes were writing. Nobody may be writing into the folder."""
    for path in unfinished_files(folder):
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unfinished_prefix(name: str, host: str | None = None) -> str:
    return f".{name}.tmp-{host or socket.gethostname()}-"


def _remove_left_over(path: Path) -> None:
    """Remove the unfinished files of `path` whose process, on this machine, is no more."""
    prefix = _unfinished_prefix(path.name)
    for name in os.listdir(path.parent):
        process = name.removeprefix(prefix)
        if name.startswith(prefix) and process.isdecimal() and not _is_running(int(process)):
            path.with_name(name).unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
