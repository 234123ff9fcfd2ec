"""The order of work on a CUDA device: streams, events, graphs, and pinned memory that the device reads by itself.

Nothing else in the engine, in data, sampling and training orders work, so that a stand-in for the few names of
`torch.cuda` used here shows whether anything is read before it is written, or overwritten while it is read: see
`tests/fake_cuda`. On a CPU device all of it is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Results = TypeVar("Results")


@dataclass(frozen=True)
class HandOver:
    """A tensor that one stream is making for another."""

    tensor: Tensor
    done: torch.Event | None = None
    """When it is made; None: it is already."""

    def take(self) -> Tensor:
        """The tensor, for work that is queued on the current stream from here on; the host does not wait."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.done)
            # Its memory belongs to the stream that made it, which may else have it back while this one still reads.
            self.tensor.record_stream(stream)
        return self.tensor


class SideStream:
    """A stream beside the one that uses its results.

    Args:
        device: a CUDA device; on a CPU nothing runs beside, and `cuda` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = torch.cuda.Stream(device) if device.type == "cuda" else None

    def active(self) -> AbstractContextManager[object]:
        """A context in which this is the current stream."""
        return nullcontext() if self.cuda is None else torch.cuda.stream(self.cuda)

    def synchronize(self) -> None:
        """Let the host wait for all that was queued here."""
        if self.cuda is not None:
            self.cuda.synchronize()

    def hand_over(self, tensor: Tensor) -> HandOver:
        """`tensor`, which work queued here is making, for another stream."""
        return HandOver(tensor, None if self.cuda is None else self.cuda.record_event())


class LastUse:
    """The time up to which the device may read a piece of pinned memory."""

    def __init__(self) -> None:
        self._event: torch.Event | None = None

    def note(self) -> None:
        """What is queued on the current stream so far may read it."""
        self._event = torch.cuda.current_stream().record_event()

    def wait(self) -> None:
        """Let the host wait until it may be overwritten."""
        if self._event is not None:
            self._event.synchronize()


class ToHost:
    """A scalar tensor on its way to the host; `wait` does not wait for later work of the device."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        self._arrived = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def wait(self) -> float:
        """The number, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.item()


class HostMemory:
    """Copies of tensors in host memory, for another thread to read while the device goes on.

    The memory is taken once and used again by the next round: fresh pages cost more than the copy. For GPU tensors it
    is pinned, and the copies are queued on the current stream, so that what is queued later may overwrite the tensors.
    """

    def __init__(self) -> None:
        self._taken: list[Tensor] = []
        self._num_used = 0
        self._arrived: torch.Event | None = None

    def start(self) -> None:
        """Begin a round of copies, of the same tensors in the same order: those of the last one are overwritten."""
        self._num_used, self._arrived = 0, None

    def copy(self, value: Tensor) -> Tensor:
        """A contiguous copy of `value` that is there once `wait` returns."""
        memory = self._take(value)
        memory.copy_(value.detach(), non_blocking=value.is_cuda)
        if value.is_cuda:
            self._arrived = torch.cuda.current_stream(value.device).record_event()
        return memory

    def wait(self) -> None:
        """Let the host wait for the copies of this round; from any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def _take(self, value: Tensor) -> Tensor:
        """Memory of the shape and dtype of `value`: that of the last round, where it fits."""
        index, self._num_used = self._num_used, self._num_used + 1
        if index == len(self._taken):
            self._taken.append(torch.empty(0))
        if (self._taken[index].shape, self._taken[index].dtype) != (value.shape, value.dtype):
            self._taken[index] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return self._taken[index]


class CudaGraphRecorder:
    """Records work as CUDA graphs, for `engine.replayed_functions`, on a stream of its own.

    They share one memory pool, so they must not be replayed at the same time. What keeps a stream in mind (DDP, the
    gradients of its parameters) is made and first run on that stream, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, SideStream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the recordings' stream is the current one, after what the other has queued before."""
        assert self._side.cuda is not None
        current = torch.cuda.current_stream(self._device)
        self._side.cuda.wait_stream(current)
        with self._side.active():
            yield
        current.wait_stream(self._side.cuda)

    def run(self, work: Callable[[], Results]) -> Results:
        """Run `work` there now; its results are for the current stream."""
        with self.active():
            handed_over = tree_map_only(Tensor, self._side.hand_over, work())
        return tree_map_only(HandOver, HandOver.take, handed_over)

    def record(self, work: Callable[[], Results]) -> Callable[[], Results]:
        """Capture `work`; the function returned queues the graph on the current stream, and gives its own tensors."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads (a data loader's, NCCL's) ask of the GPU meanwhile is no error.
        capture = torch.cuda.graph(graph, self._pool, self._side.cuda, capture_error_mode="thread_local")
        with capture:
            results = work()

        def replay() -> Results:
            graph.replay()
            return results

        return replay
