"""Memory of the fake device, or pinned memory of the host, and the tensors in it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Self

import torch

from fake_cuda.clocks import Line, Moment
from fake_cuda.nested import leaves

if TYPE_CHECKING:
    from fake_cuda.runtime import FakeCuda

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Memory:
    """A piece of memory and its last uses; pinned memory of the host has no `owner`."""

    def __init__(self, cuda: FakeCuda, owner: Line | None) -> None:
        self.owner = owner
        """The stream that it was taken from the allocator on, which may have it back when the tensors are gone."""
        self.written: list[tuple[range, Moment]] = []
        """Bytes, by their address, and when they were written; newer ones do not reach into older ones."""
        self.read: list[tuple[range, Moment]] = []
        """The same of reads since."""
        self.recorded: set[Line] = set()
        """Streams given to `record_stream`: the allocator waits for them."""
        self.graph: object | None = None
        """The recording whose private memory it is."""
        self.cuda = cuda

    def uses(self) -> list[Moment]:
        return [moment for _, moment in (*self.read, *self.written)]

    def __del__(self) -> None:
        if self.owner is None or self.graph is not None or self.cuda.is_closed:
            return
        host = self.cuda.host()
        for moment in self.uses():
            ordered = self.owner.has_seen(moment) or host.has_seen(moment)
            if not ordered and moment.line not in self.recorded:
                self.cuda.problem(f"given back while it is used: to {self.owner}, while {moment.line} may use it")


class Access:
    """The bytes of a memory between a tensor's first and its last."""

    def __init__(self, tensor: Tracked) -> None:
        inner = tensor.inner
        length = sum((n - 1) * step for n, step in zip(inner.shape, inner.stride(), strict=True)) + 1
        start = inner.data_ptr()
        self.memory = tensor.memory
        self.bytes = range(start, start + (length * inner.element_size() if inner.numel() else 0))

    def happens(self, line: Line, moment: Moment, *, writes: bool) -> None:
        """Check and note that work at `moment` of `line` reads or writes the bytes."""
        memory = self.memory
        for part, written in memory.written:
            if self._overlaps(part) and not line.has_seen(written):
                what = "overwritten before" if writes else "read before"
                memory.cuda.problem(f"{what} it is written: by {line}, while {written.line} may still be writing")
        if not writes:
            memory.read = [(part, read) for part, read in memory.read if read.line is not line or part != self.bytes]
            memory.read.append((self.bytes, moment))
            return
        for part, read in memory.read:
            if self._overlaps(part) and not line.has_seen(read):
                memory.cuda.problem(f"overwritten while it is read: by {line}, while {read.line} may read it")
        memory.read = [(part, read) for part, read in memory.read if not self._overlaps(part)]
        memory.written = [(part, written) for part, written in memory.written if not self._covers(part)]
        memory.written.append((self.bytes, moment))

    def _overlaps(self, part: range) -> bool:
        return max(part.start, self.bytes.start) < min(part.stop, self.bytes.stop)

    def _covers(self, part: range) -> bool:
        return self.bytes.start <= part.start and part.stop <= self.bytes.stop


class Tracked(torch.Tensor):
    """A tensor of the fake device or in pinned memory. `inner` is a CPU tensor with its values."""

    inner: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory) -> Self:
        device = CPU if memory.owner is None else CUDA
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        tensor.inner, tensor.memory = inner, memory
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        tracked = next(x for x in leaves((args, kwargs)) if isinstance(x, Tracked))
        return tracked.memory.cuda.run(function, args, kwargs or {})

    def record_stream(self, stream) -> None:
        self.memory.recorded.add(stream.line)

    def is_pinned(self, device=None) -> bool:
        return self.memory.owner is None

    def numpy(self, *, force=False):
        self.memory.cuda.host_writes(self)  # as others may through the array
        return self.inner.numpy()

    def tolist(self):
        self.memory.cuda.host_reads(self)
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Tracked({self.device}, {self.inner})"


class LaterAccess:
    """An access that is made again and again, to memory that something else has to keep."""

    def __init__(self, access: Access) -> None:
        self._memory, self._access = weakref.ref(access.memory), access
        del access.memory

    @property
    def is_possible(self) -> bool:
        return self._memory() is not None

    def happens(self, line: Line, moment: Moment, *, writes: bool) -> None:
        self._access.memory = self._memory()
        self._access.happens(line, moment, writes=writes)
        del self._access.memory
