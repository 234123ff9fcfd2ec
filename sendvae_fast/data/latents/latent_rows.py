"""Rows of latent shards: the places of samples' latents, read at random or, by `LatentReader`, ahead of their use.

Shape letters: B batch, C channels, H W latent height and width. A sample has a row in each field (mean, std), in one or
two variants (plain, flipped).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from sendvae_fast.data.latents.shard_format import tensor_places
from sendvae_fast.engine.streams import LastUse
from sendvae_fast.errors import UserError
from sendvae_fast.ops import library


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    path: Path
    bytes: int
    count: int
    """Samples in it."""
    offsets: tuple[int, ...]
    """Byte of the first row of each field of each variant, variant by variant."""


@dataclass(frozen=True)
class LatentRows:
    """The rows of all shards; a sample id counts through them in order."""

    shards: tuple[Shard, ...]
    num_fields: int
    num_variants: int
    dtype: torch.dtype
    shape: tuple[int, int, int]
    """Of one row, [C, H, W]."""

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    @classmethod
    def of_files(cls, paths: Sequence[Path], variants: Sequence[Sequence[str]]) -> "LatentRows":
        """Rows of safetensors files in which variant v of field f is the tensor `variants[v][f]`, all of one dtype.

        Raises:
            UserError: a file cannot be read, lacks a tensor, or has tensors of other shapes or dtypes than the first.
        """
        names = [name for fields in variants for name in fields]
        shards, first = [], None
        for path in paths:
            try:
                places = tensor_places(path)
                found = [places[name] for name in names]
            except (SafetensorError, OSError) as error:
                raise UserError(f"the latent shard {path} cannot be read ({error}); replace it") from None
            except KeyError as error:
                raise UserError(f"the latent shard {path} has no tensor {error}; is it of another program?") from None
            first = first or found[0]
            for name, place in zip(names, found, strict=True):
                if (
                    len(place.shape) != 4
                    or place.shape != (found[0].shape[0], *first.shape[1:])
                    or (place.dtype != first.dtype)
                ):
                    raise UserError(
                        f"{name} in the latent shard {path} is {place.dtype} {list(place.shape)}, not "
                        f"{first.dtype} {[found[0].shape[0], *first.shape[1:]]} like the others; replace the shard"
                    )
            shards.append(Shard(path, path.stat().st_size, found[0].shape[0], tuple(place.offset for place in found)))
        if first is None:
            raise UserError("there are no latent shards to read")
        _, channels, height, width = first.shape
        return cls(tuple(shards), len(variants[0]), len(variants), first.dtype, (channels, height, width))

    def load(self, ids: Tensor, variants: Tensor | None = None) -> list[Tensor]:
        """The fields [B, C, H, W] of the samples `ids` int64 [B], each in its variant (default: all in the first).

        Raises:
            IndexError: an id or a variant that is not there.
            UserError: a shard that has changed since it was opened.
        """
        variants = torch.zeros_like(ids) if variants is None else variants
        for name, values, end in (("id", ids, len(self)), ("variant", variants, self.num_variants)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < end:
                raise IndexError(f"{name}s must be in [0, {end}), got {int(values.min())} .. {int(values.max())}")
        fields = [torch.empty(len(ids), *self.shape, dtype=self.dtype) for _ in range(self.num_fields)]
        ends = np.cumsum([shard.count for shard in self.shards])
        shard_of = np.searchsorted(ends, ids.numpy(), side="right")
        for k in np.unique(shard_of).tolist():
            shard, rows = self.shards[k], np.flatnonzero(shard_of == k)
            if shard.path.stat().st_size != shard.bytes:
                raise UserError(f"the latent shard {shard.path} was cut short or changed while in use; replace it")
            file = np.memmap(shard.path, np.uint8, "r")
            for row in rows.tolist():
                local = int(ids[row]) - int(ends[k] - shard.count)
                for f, field in enumerate(fields):
                    start = shard.offsets[int(variants[row]) * self.num_fields + f] + local * self.row_bytes
                    _bytes_of(field[row])[:] = file[start : start + self.row_bytes]
        return fields


class LatentReader:
    """Reads latents in the order of a plan, several batches ahead, with threads outside Python (`_host.LatentReader`).

    Where the compiled module is missing, rows are read when they are asked for.
    """

    def __init__(
        self, rows: LatentRows, *, num_threads: int = 4, read_ahead: int = 8, pin_memory: bool = False
    ) -> None:
        self.rows, self.read_ahead, self.pin_memory = rows, read_ahead, pin_memory
        host = library.host()
        self._native = host and host.LatentReader(
            [(str(shard.path), shard.bytes, shard.count, list(shard.offsets)) for shard in rows.shards],
            [rows.row_bytes] * rows.num_fields,
            num_threads,
        )

    def read(self, plan: Iterable[tuple[Tensor, Tensor | None, Any]]) -> Iterator[tuple[list[Tensor], Any]]:
        """Yield (fields [B, C, H, W], payload) of each (ids int64 [B], variants int64 [B] or None, payload) of `plan`.

        The plan is consumed `read_ahead` batches ahead of delivery. The fields lie in buffers that are reused: they are
        valid until the next batch is asked for or, copied from pinned memory to a CUDA device, until that copy has
        ended.

        Raises:
            UserError: a shard that cannot be read or has changed, by name.
        """
        if self._native is None:
            for ids, variants, anything in plan:
                yield self.rows.load(ids, variants), anything
            return
        free: deque[_Buffers] = deque()
        waiting: deque[tuple[_Buffers, Any, list[Tensor], Any]] = deque()
        for ids, variants, anything in plan:
            # One set more than batches in flight: a copy to the device may still read the one delivered last.
            buffers = free.popleft() if len(free) > 1 else _Buffers(self.rows, len(ids), self.pin_memory)
            fields = buffers.fields(len(ids))
            chosen = torch.zeros_like(ids) if variants is None else variants
            ticket = self._native.submit(ids.tolist(), chosen.tolist(), [_bytes_of(field) for field in fields])
            waiting.append((buffers, ticket, fields, anything))
            if len(waiting) > self.read_ahead:
                yield from self._deliver(waiting, free)
        while waiting:
            yield from self._deliver(waiting, free)

    def _deliver(self, waiting: deque, free: deque) -> Iterator[tuple[list[Tensor], Any]]:
        buffers, ticket, fields, anything = waiting.popleft()
        try:
            ticket.wait()
        except OSError as error:
            raise UserError(f"the latent shard {error}; replace it and run the same command again") from None
        yield fields, anything
        buffers.note_use()
        free.append(buffers)


class _Buffers:
    """Memory for the fields of one batch."""

    def __init__(self, rows: LatentRows, batch: int, pin_memory: bool) -> None:
        self._fields = [
            torch.empty(batch, *rows.shape, dtype=rows.dtype, pin_memory=pin_memory) for _ in range(rows.num_fields)
        ]
        self._last_use = LastUse()
        self._pinned = pin_memory

    def fields(self, batch: int) -> list[Tensor]:
        """Views of `batch` rows, once nothing on a device reads the memory any more."""
        self._last_use.wait()
        if batch > len(self._fields[0]):
            self._fields = [field.new_empty(batch, *field.shape[1:], pin_memory=self._pinned) for field in self._fields]
        return [field[:batch] for field in self._fields]

    def note_use(self) -> None:
        """Record that the work queued on the device so far may read the memory."""
        if self._pinned:
            self._last_use.note()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor; NumPy knows no bfloat16."""
    return tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
