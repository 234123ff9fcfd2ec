"""What is done of a folder's work: a note of each part with its seconds, which outlives whoever did it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sendvae_fast.files import write_atomic
from sendvae_fast.reading import numbers_in, read_json, reading

PARTS_FILE = "parts.json"


@contextmanager
def noting(folder: Path, part: str, writes: bool = True) -> Iterator[list[int]]:
    """Note that a part is done and how long it took, the first time it is. What is appended are exit codes.

    A part that ends with an error, or with an exit code other than 0, is not noted: it is done again, or gone on with.

    Args:
        folder: of the note.
        part: its name.
        writes: False on ranks other than the first.
    """
    start_s, codes = time.monotonic(), []
    yield codes
    done = seconds_of_parts(folder)
    if writes and part not in done and not any(codes):
        done[part] = round(time.monotonic() - start_s, 1)
        write_atomic(folder / PARTS_FILE, json.dumps(done) + "\n")


def seconds_of_parts(folder: Path) -> dict[str, float]:
    """How long each part took that is done. UserError where the file that says so is damaged."""
    path, remedy = folder / PARTS_FILE, "remove it and run the same command again"
    if not path.is_file():
        return {}
    seconds = read_json(path, remedy)
    with reading(path, remedy):
        return numbers_in(seconds)
