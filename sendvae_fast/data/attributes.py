"""Binary attributes of pictures: `attributes.csv` beside them.

Its first line is `file,<attribute>,...`; each further line holds a sample's name, with forward slashes, and one 0 or 1
per attribute.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sendvae_fast.errors import UserError
from sendvae_fast.files import staged
from sendvae_fast.reading import reading

ATTRIBUTES_FILE = "attributes.csv"


@dataclass(frozen=True)
class Attributes:
    """Binary attributes of every image of a catalog."""

    names: tuple[str, ...]
    values: np.ndarray
    """bool [num_images, len(names)]."""


def read_attributes(root: Path, sample_names: list[str]) -> Attributes | None:
    """The table in `root`, None when there is none.

    Raises:
        UserError: when the table is malformed or has no line for a sample.
    """
    table = root / ATTRIBUTES_FILE
    if not table.exists():
        return None
    with reading(table, "correct or remove it"), open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0][:1] != ["file"] or len(rows[0]) < 2:
        raise UserError(f"{table} must begin with a line 'file,<attribute>,...'; correct or remove it")
    names = tuple(rows[0][1:])
    by_file: dict[str, list[bool]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(names) + 1 or not {"0", "1"}.issuperset(row[1:]):
            raise UserError(f"{table} line {number} must be a file name and {len(names)} values 0 or 1; correct it")
        by_file[row[0]] = [value == "1" for value in row[1:]]
    missing = [name for name in sample_names if name not in by_file]
    if missing:
        raise UserError(f"{table} has no line for {missing[0]} ({len(missing)} images lack one); add them or remove it")
    return Attributes(names=names, values=np.array([by_file[name] for name in sample_names], bool))


def write_attributes(root: Path, names: Sequence[str], samples: Iterable[tuple[str, Iterable[int]]]) -> None:
    """Write the table into `root`, whole or not at all.

    Args:
        names: of the attributes.
        samples: the name of each sample and its values, 0 or 1.
    """
    with staged(root / ATTRIBUTES_FILE) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", *names))
        writer.writerows((name, *values) for name, values in samples)
