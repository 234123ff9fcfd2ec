"""Long work on many pictures over any number of ranks, resumable: a file for every thousand pictures.

A file appears whole or not at all, so an interrupted evaluation goes on where it stopped, and nothing depends on how
many ranks share the work. It carries the hash of what is in it: a damaged one is never measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.reading import NotOfItsKind, reading

CHUNK = 1000
"""Pictures per file."""
HASH_KEY = "sha256"
"""In a file's metadata: `weights_sha256` of its columns."""
Columns = dict[str, Tensor]
"""What was computed, by name: a row for each picture."""


class Chunks:
    """Columns in parts, on the CPU or in files."""

    def __init__(self, parts: list[Columns] | list[Path]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Columns]:
        """The parts, in the order of pictures."""
        return (_read(part) if isinstance(part, Path) else part for part in self._parts)

    def column(self, name: str) -> Tensor | None:
        """A column whole, None where there is none."""
        parts = [part[name] for part in self if name in part]
        return torch.cat(parts) if parts else None

    def __getitem__(self, name: str) -> Tensor:
        """A column whole. Raises KeyError where there is none."""
        return torch.cat([part[name] for part in self])


def compute_chunks(
    num: int,
    compute: Callable[[int, int], Columns],
    distributed: Distributed | None = None,
    folder: Path | None = None,
    size: int | None = None,
) -> Chunks:
    """Compute the columns of `num` pictures. Collective where `folder` is given; without it every rank does everything.

    Args:
        num: pictures.
        compute: columns of pictures start .. stop - 1, on the CPU.
        distributed: the ranks that share the work.
        folder: of the files, for this work alone, on a file system that all ranks see.
        size: pictures per file, by default `CHUNK`. The fewer, the more evenly ranks share few pictures.

    Raises:
        UserError: the disk is full, `compute` raised one, or another rank failed.
    """
    size = size or CHUNK
    ranges = [(start, min(start + size, num)) for start in range(0, num, size)]
    if folder is None:
        return Chunks([compute(start, stop) for start, stop in ranges])
    ranks = distributed or Distributed()
    files = [folder / f"part_{number:05d}.safetensors" for number in range(len(ranges))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    missing = ranks.broadcast_object(missing)  # before any rank writes
    with ranks.all_or_none():
        for number in missing[ranks.rank :: ranks.world_size]:
            _write(files[number], compute(*ranges[number]))
    return Chunks(files)


def folder_name(*words: object) -> str:
    """A folder's name of what decides the work in it."""
    return "_".join(str(word) for word in words).replace(" ", "_")


def _write(file: Path, columns: Columns) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: column.contiguous() for name, column in columns.items()}
        save_tensors(file, whole, {HASH_KEY: weights_sha256(whole)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file} ({error}): make room and run the same command again to go on") from error


def _read(file: Path) -> Columns:
    with reading(file, "remove it and run the same command again"), safe_open(file, "pt") as content:
        columns = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no dict
        if (content.metadata() or {}).get(HASH_KEY) != weights_sha256(columns):
            raise NotOfItsKind("its hash is not that of its content")
    return columns
