"""Readers of the published attribute files of CelebA, DeepFashion and AwA2, and of the lists of their splits."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.progress import Progress
from sendvae_fast.reading import NotOfItsKind, reading

AGAIN = "fetch the file again"


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
    if len(lines) < 2 or not lines[0].strip().isdecimal():
        raise UserError(f"{path} is no CelebA attribute list: its first line must be the number of pictures")
    rows = [line.split() for line in lines[2:] if line.strip()]
    if lines[0].strip() != str(len(rows)):
        raise UserError(f"{path} announces {lines[0].strip():.20} pictures but lists {len(rows)}; {AGAIN}")
    return _table(path, lines[1].split(), rows, {"1": 1, "-1": 0}, first_line=3)


def read_awa2_attributes(directory: str | os.PathLike[str]) -> AttributeTable:
    """AwA2's `classes.txt`, `predicates.txt` and `predicate-matrix-binary.txt`: 85 attributes of each of 50 classes."""
    directory = Path(directory)
    matrix = directory / "predicate-matrix-binary.txt"
    classes, names = (_numbered_names(directory / name) for name in ("classes.txt", "predicates.txt"))
    rows = [line.split() for line in _read_lines(matrix) if line.strip()]
    if len(rows) != len(classes):
        raise UserError(f"{matrix} has {len(rows)} rows for {len(classes)} classes; fetch the dataset again")
    rows = [[key, *row] for key, row in zip(classes, rows, strict=True)]
    return _table(matrix, names, rows, {"1": 1, "0": 0}, first_line=1)


def read_deepfashion_attributes(names: str | os.PathLike[str], values: str | os.PathLike[str]) -> AttributeTable:
    """DeepFashion's category and attribute prediction: 1000 attributes of each of 289,222 pictures.

    Args:
        names: `list_attr_cloth.txt`: a count, a heading, then a name, which may have spaces, and a type per line.
        values: `list_attr_img.txt`: a count, a heading, then per picture its path and 1, 0 (unknown, taken as absent)
            or -1 for each name.

    Raises:
        UserError: a file cannot be read or is not of this form.
    """
    words = [line.rsplit(maxsplit=1)[0] for line in _read_lines(names)[2:] if line.strip()]
    keys: list[str] = []
    with reading(values, AGAIN), open(values, encoding="utf-8") as file:
        num = int(file.readline())
        file.readline()
        # A picture's line has two characters or more for each value.
        if not 0 <= num * max(2 * len(words), 1) <= os.fstat(file.fileno()).st_size:
            raise NotOfItsKind(f"{num} pictures of {len(words)} attributes are announced, which it is too short for")
        table = np.zeros((num, len(words)), np.uint8)
        with Progress("reading attributes", num, unit="picture") as progress:
            for number, line in enumerate(file):
                key, _, rest = line.partition(" ")
                row = np.array(rest.split(), dtype=np.int8)
                if row.shape != (len(words),) or not np.isin(row, (-1, 0, 1)).all():
                    raise UserError(f"{values}, line {number + 3}: not {len(words)} values of -1, 0 or 1; {AGAIN}")
                if number < num:
                    table[number] = row == 1
                keys.append(key)
                progress.advance()
    if len(keys) != num:
        raise UserError(f"{values} announces {num} pictures but lists {len(keys)}; {AGAIN}")
    return AttributeTable(tuple(keys), tuple(words), torch.from_numpy(table))


def read_partition(path: str | os.PathLike[str], words: tuple[str, str, str]) -> dict[str, int]:
    """`list_eval_partition.txt`: for each picture 0 (training), 1 (validation) or 2 (test).

    Args:
        path: the file; lines that are not a name and one of `words` at its head (count and heading) are passed over.
        words: what stands for the three.

    Raises:
        UserError: the file cannot be read, or a later line is not of this form.
    """
    lines = [line.split() for line in _read_lines(path) if line.strip()]
    while lines and (len(lines[0]) != 2 or lines[0][1] not in words):
        del lines[0]
    if wrong := [row for row in lines if len(row) != 2 or row[1] not in words]:
        raise UserError(f"{path}: {' '.join(wrong[0])!r} does not end in one of {', '.join(words)}; {AGAIN}")
    return {name: words.index(word) for name, word in lines}


def read_class_list(path: str | os.PathLike[str]) -> list[str]:
    """A class per line: AwA2's `trainclasses.txt` and `testclasses.txt`."""
    return [line.strip() for line in _read_lines(path) if line.strip()]


def _numbered_names(path: Path) -> list[str]:
    """The names of a file with a number and a name in each line."""
    lines = [line.split() for line in _read_lines(path) if line.strip()]
    if wrong := [row for row in lines if len(row) != 2]:
        raise UserError(f"{path}: {' '.join(wrong[0])!r:.80} is no number and name; {AGAIN}")
    return [name for _, name in lines]


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
