"""torch.cuda.CUDAGraph and torch.cuda.graph: a capture runs nothing, a replay runs it on the same memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fake_cuda.memory import Access, LaterAccess
from fake_cuda.nested import leaves

if TYPE_CHECKING:
    from fake_cuda.runtime import FakeCuda


class CUDAGraph:
    """A recording: operators on inner tensors, and the memory that they read and write."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.pool: object = None
        self.is_overwritten = False
        self._calls: list[tuple] = []
        self._own: list[Access] = []
        self._reads: list[LaterAccess] = []
        self._writes: list[LaterAccess] = []

    def record(self, function, args, kwargs, written: list[torch.Tensor]):
        """An operator's results in the right shapes; nothing that was there before is changed."""
        before = [x.clone() for x in written]
        out = function(*args, **kwargs)
        outputs = [x for x in leaves(out) if isinstance(x, torch.Tensor)]
        self._calls.append((function, args, kwargs, outputs))
        for x, old in zip(written, before, strict=True):
            x.copy_(old)
        inputs = {x.untyped_storage().data_ptr() for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in outputs:
            if x.untyped_storage().data_ptr() not in inputs and x.is_floating_point():
                x.fill_(float("nan"))  # not computed yet
        return out

    def note(self, reads: list[Access], writes: list[Access]) -> None:
        """What an operator reads and writes. The memory of others is not kept: whoever replays must."""
        for accesses, kept in ((reads, self._reads), (writes, self._writes)):
            for access in accesses:
                if access.memory.graph is self:
                    self._own.append(access)
                else:
                    kept.append(LaterAccess(access))

    def replay(self) -> None:
        cuda = self.cuda
        cuda.forbid_in_capture("graph.replay")
        if not all(access.is_possible for access in (*self._reads, *self._writes)):
            cuda.problem("a replay uses memory that was given back after the capture")
            return
        for other in cuda.graphs:
            other.is_overwritten |= other.pool is self.pool and other is not self
        self.is_overwritten = False
        line, moment = cuda.launch()
        for access in self._reads:
            access.happens(line, moment, writes=False)
        for access in (*self._writes, *self._own):
            access.happens(line, moment, writes=True)
        with _disable_current_modes():
            for function, args, kwargs, outputs in self._calls:
                again = [x for x in leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
                for x, new in zip(outputs, again, strict=True):
                    if x.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        x.copy_(new)


@contextmanager
def capture(graph: CUDAGraph, pool: object = None, stream=None, capture_error_mode: str = "global"):
    """torch.cuda.graph, which synchronises the device first."""
    cuda = graph.cuda
    cuda.synchronize()
    graph.pool = pool if pool is not None else object()
    cuda.graphs.append(graph)
    with cuda.stream(stream or cuda.new_stream()):
        cuda.capturing = graph
        try:
            yield
        finally:
            cuda.capturing = None
