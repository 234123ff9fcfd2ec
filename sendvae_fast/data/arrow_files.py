"""Files for Arrow, which takes paths as text, knows none that are not UTF-8, and waits for ever at a FIFO."""

import os

import pyarrow as pa


def open_for_arrow(path: str | os.PathLike[str]) -> pa.NativeFile:
    """A regular file, open for Arrow's readers. OSError where it is missing, not readable, or of another kind."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a regular file")
    return pa.OSFile(os.fsencode(path))  # pyright: ignore[reportArgumentType] - bytes are taken as they are


def create_for_arrow(path: str | os.PathLike[str]) -> pa.NativeFile:
    """A new file, open for Arrow's writers. OSError where it cannot be made."""
    return pa.OSFile(os.fsencode(path), "wb")  # pyright: ignore[reportArgumentType]
