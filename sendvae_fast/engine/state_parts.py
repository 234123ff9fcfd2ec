"""Tensors of which every rank writes the part that it holds, one file a rank, and which are read as wholes.

<directory>/optimizer_rank{r}.safetensors    "<name>": a whole tensor
                                             "<name>@<start>": numbers of the flattened tensor, from index <start> on
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from sendvae_fast.reading import NotOfItsKind

_MARK = "@"
"""Before the index that a part begins at; no name of a parameter has it."""


class Part(NamedTuple):
    """Consecutive numbers of a flattened tensor: all, in any shape, or some, flat."""

    start: int
    values: Tensor

    def named(self, name: str, shape: torch.Size) -> tuple[str, Tensor]:
        """The part of the tensor `name` as it is written: a whole has its shape."""
        if self.values.numel() == shape.numel():
            return name, self.values.reshape(shape)
        return f"{name}{_MARK}{self.start}", self.values


class SavedParts:
    """The tensors of one directory by name, read one at a time. Made by `open_parts`."""

    def __init__(self, stored: dict[str, list[tuple[int, Any, str]]]) -> None:
        self._stored = stored

    @property
    def names(self) -> set[str]:
        """Of the tensors that there is at least a part of."""
        return set(self._stored)

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """A tensor, put together from its parts.

        Raises:
            NotOfItsKind: it has another shape, or parts overlap or leave gaps.
        """
        stored = sorted(self._stored[name], key=lambda part: part[0])
        parts = [Part(start, file.get_tensor(stored_name)) for start, file, stored_name in stored]
        if len(parts) == 1:
            (start, whole), *_ = parts
            if start or whole.shape != shape:
                raise NotOfItsKind(f"{name} has shape {list(whole.shape)} from index {start}, not {list(shape)}")
            return whole
        whole, end = parts[0].values.new_empty(shape.numel()), 0
        for start, values in parts:
            if start != end or values.dim() != 1 or end + len(values) > len(whole):
                raise NotOfItsKind(f"{name} has {list(values.shape)} numbers from index {start} on, after {end}")
            end += len(values)
            whole[start:end] = values
        if end != len(whole):
            raise NotOfItsKind(f"{name} has {end} of {len(whole)} numbers")
        return whole.view(shape)


def rank_file(directory: Path, rank: int) -> Path:
    """What one rank writes."""
    return directory / f"optimizer_rank{rank}.safetensors"


@contextmanager
def open_parts(directory: Path, num_ranks: int) -> Iterator[SavedParts]:
    """What so many ranks wrote into a directory, while the context lasts.

    Raises:
        ValueError: a name's index is no number. And what safetensors raises for a damaged file.
    """
    stored = defaultdict(list)
    with ExitStack() as files:
        for rank in range(num_ranks):
            file = files.enter_context(safe_open(rank_file(directory, rank), framework="pt"))
            for stored_name in file.keys():  # noqa: SIM118 - it is no mapping
                name, _, start = stored_name.partition(_MARK)
                stored[name].append((int(start or 0), file, stored_name))
        yield SavedParts(stored)
