"""Readers of the published attribute files: CelebA's list and AwA2's class matrix."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sendvae_fast.errors import UserError


@dataclass(frozen=True)
class AttributeTable:
    """Binary attributes, one row per picture (`keys` are file names) or per class (class names)."""

    keys: tuple[str, ...]
    names: tuple[str, ...]
    values: Tensor
    """uint8 [len(keys), len(names)] of 0 and 1."""


def read_celeba_attributes(path: str | os.PathLike[str]) -> AttributeTable:
    """`list_attr_celeba.txt`: a count, the 40 names, then per picture its file name and 1 or -1 for each name."""
    lines = _read_lines(path)
    if len(lines) < 2 or not lines[0].strip().isdigit():
        raise UserError(f"{path} is no CelebA attribute list: its first line must be the number of pictures")
    rows = [line.split() for line in lines[2:] if line.strip()]
    if len(rows) != int(lines[0]):
        raise UserError(f"{path} announces {int(lines[0])} pictures but lists {len(rows)}; fetch the file again")
    return _table(path, lines[1].split(), rows, {"1": 1, "-1": 0}, first_line=3)


def read_awa2_attributes(directory: str | os.PathLike[str]) -> AttributeTable:
    """AwA2's `classes.txt`, `predicates.txt` and `predicate-matrix-binary.txt`: 85 attributes of each of 50 classes."""
    directory = Path(directory)
    matrix = directory / "predicate-matrix-binary.txt"
    classes, names = (
        [line.split()[1] for line in _read_lines(directory / name) if line.strip()]
        for name in ("classes.txt", "predicates.txt")
    )
    rows = [line.split() for line in _read_lines(matrix) if line.strip()]
    if len(rows) != len(classes):
        raise UserError(f"{matrix} has {len(rows)} rows for {len(classes)} classes; fetch the dataset again")
    rows = [[key, *row] for key, row in zip(classes, rows, strict=True)]
    return _table(matrix, names, rows, {"1": 1, "0": 0}, first_line=1)


def _read_lines(path: str | os.PathLike[str]) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the attributes in {path} ({error}); give the path of that file") from error


def _table(
    path: str | os.PathLike[str], names: list[str], rows: list[list[str]], meaning: dict[str, int], first_line: int
) -> AttributeTable:
    values = []
    for line, row in enumerate(rows, start=first_line):
        if len(row) != len(names) + 1:
            raise UserError(f"{path}, line {line}: {len(row) - 1} values for {len(names)} attributes; mend that line")
        try:
            values.append([meaning[word] for word in row[1:]])
        except KeyError as error:
            raise UserError(f"{path}, line {line}: {error.args[0]!r} is neither of {' '.join(meaning)}") from None
    table = torch.tensor(values, dtype=torch.uint8).reshape(len(rows), len(names))
    return AttributeTable(tuple(row[0] for row in rows), tuple(names), table)
