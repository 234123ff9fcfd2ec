"""Files that are either the old ones or the new ones after a crash, never something between."""

import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush a file or a directory (its list of names) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`: a reader, or a crash, sees the old file or the new one."""
    staged = path.with_name(path.name + ".tmp")
    with open(staged, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    fsync_path(path.parent)
