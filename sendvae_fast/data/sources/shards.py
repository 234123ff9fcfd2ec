"""The files that a pattern or a folder of shards stands for."""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sendvae_fast.data.sources.folder import visible_entries
from sendvae_fast.errors import UserError

CATALOG_NAME = "catalog.parquet"
"""Name of the catalog by which a folder of shards is opened. A file whose name ends with it is no shard."""
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
MAX_SHARDS = 2**18
"""Files that one pattern may name by its braces: 256 million samples in shards of a thousand."""
MAX_BRACES = 16
SPLIT_WORDS = re.compile(r"(?<![a-z])(train|val|validation|test)(?![a-z])")


def is_pattern(where: str) -> bool:
    """Whether a path is a pattern to expand; a path that exists under this very name is not."""
    return any(mark in where for mark in "*?[{") and not os.path.exists(where)


def expand(pattern: str) -> list[Path]:
    """The files a pattern names, sorted: `{000..127}` and `{a,b}` as in WebDataset, `*`, `?` and `[...]` as in a shell.

    Raises:
        UserError: when a file that braces name is missing, nothing matches, or the braces stand for too many files.
    """
    too_many = pattern.count("{") > MAX_BRACES
    names = [] if too_many else list(itertools.islice(_expand_braces(pattern), MAX_SHARDS + 1))
    if too_many or len(names) > MAX_SHARDS:
        raise UserError(f"{pattern} has over {MAX_BRACES} braces or stands for over {MAX_SHARDS} files: correct it")
    found = []
    for name in names:
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        found += matches
    missing = [name for name in found if not os.path.isfile(name)]
    if missing or not found:
        what = f"{missing[0]} does not exist ({len(missing)} missing)" if missing else "nothing matches"
        raise UserError(f"{pattern}: {what}; correct the pattern or fetch the files")
    return [Path(name) for name in found]


def shards_in(folder: Path, suffix: str) -> list[Path]:
    """The files in `folder` that end with `suffix`, sorted.

    Raises:
        UserError: when they are of several splits, so that the choice is open.
    """
    found = sorted(
        Path(entry.path)
        for entry in visible_entries(folder)
        if entry.name.endswith(suffix) and not entry.name.endswith(CATALOG_NAME) and entry.is_file()
    )
    splits = {word for path in found for word in SPLIT_WORDS.findall(path.name.lower())}
    if len(splits) > 1:
        raise UserError(
            f"{folder} holds files of the splits {', '.join(sorted(splits))}; give those of one, "
            f"as in '{folder}/*{min(splits)}*{suffix}'"
        )
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    numbers = RANGE.fullmatch(match[1])
    if numbers:
        first, last = numbers.groups()
        options = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        options = iter(match[1].split(","))
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for option in options:
        yield from _expand_braces(head + option + tail)
