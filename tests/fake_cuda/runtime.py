"""The names of torch.cuda that the package uses, on clocks."""

from __future__ import annotations

import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Self
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing

from fake_cuda.clocks import Line
from fake_cuda.graphs import CUDAGraph, capture
from fake_cuda.memory import CPU, CUDA, Access, Memory, Tracked
from fake_cuda.nested import leaves, mapped

PACKAGE = "sendvae_fast"
# Reading operators for which the host waits, beside those that return a number.
WAITS = ("aten::nonzero", "aten::_local_scalar_dense", "aten::equal", "aten::masked_select", "aten::_unique2")
# Arguments that operators write into though their schemas do not say so.
UNMARKED = {"aten::native_batch_norm": ("running_mean", "running_var")}


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.line = cuda, Line(name)
        self.cuda_stream = id(self)
        self.device = CUDA

    def wait_event(self, event: Event) -> None:
        self.line.wait_for(event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.line.wait_for(other.line.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.cuda.forbid_in_capture("stream.synchronize")
        self.cuda.host().wait_for(self.line.clock)


class Event:
    """torch.cuda.Event."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.clock = cuda, {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.cuda.current_stream()
        stream.line.wait_for(self.cuda.host().clock)
        self.clock = dict(stream.line.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.cuda.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.cuda.forbid_in_capture("event.synchronize")
        self.cuda.host().wait_for(self.clock)


class Executor(ThreadPoolExecutor):
    """Its threads see the fake device; a task begins after its `submit`, and ends before `result` returns."""

    def __init__(self, cuda: FakeCuda, *args, **options) -> None:
        self._cuda = cuda
        super().__init__(*args, **options, initializer=cuda.enter_thread)

    def submit(self, function, /, *args, **kwargs) -> Task:
        cuda, before, end = self._cuda, dict(self._cuda.host().clock), {}

        def task():
            cuda.host().wait_for(before)
            try:
                return function(*args, **kwargs)
            finally:
                end.update(cuda.host().clock)

        return Task(cuda, super().submit(task), end)


class Task:
    """A future: what the task did has happened for the thread that asks for its result."""

    def __init__(self, cuda: FakeCuda, future: Future, end: dict[Line, int]) -> None:
        self._cuda, self._future, self._end = cuda, future, end

    def result(self, timeout=None):
        try:
            return self._future.result(timeout)
        finally:
            self._cuda.host().wait_for(self._end)


class _Mode(TorchDispatchMode):
    """Sees what no tracked tensor takes part in: tensors made on the device or in pinned memory."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.cuda.run(function, args, kwargs or {})


class FakeCuda:
    """A fake device for the length of a `with` block; `problems` are the places where the order was wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.is_closed = False
        self.default_stream = Stream(self, "the default stream")
        self.streams = [self.default_stream]
        self.capturing: CUDAGraph | None = None
        self.graphs: list[CUDAGraph] = []
        self._of_thread = threading.local()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        torch._C._ensureCUDADeviceGuardSet()
        enter = self._stack.enter_context
        # Parameters become new ones on the fake device: their memory cannot be exchanged under them.
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        names = {
            "_lazy_init": lambda: None, "is_available": lambda: True, "current_device": lambda: 0,
            "Stream": self.new_stream, "Event": lambda **_: Event(self), "current_stream": self.current_stream,
            "stream": self.stream, "synchronize": self.synchronize, "CUDAGraph": lambda: CUDAGraph(self),
            "graph": capture, "graph_pool_handle": object,
        }  # fmt: skip
        for name, value in names.items():
            enter(patch.object(torch.cuda, name, value))
        enter(torch.autograd.set_multithreading_enabled(False))  # there are no threads of the autograd engine for it
        # Tensors of inference mode have no version, which views of a tensor subclass are given.
        enter(patch.object(torch._C, "_InferenceMode", lambda mode: torch.no_grad() if mode else nullcontext()))
        enter(torch.backends.cudnn.flags(enabled=False))  # whose operators no CPU has
        enter(_Mode(self))
        return self

    def __exit__(self, *error) -> None:
        self.is_closed = True
        self._stack.close()

    def enter_thread(self) -> None:
        """Let a new thread see the device; to its end."""
        _Mode(self).__enter__()

    def executor(self, *args, **options) -> Executor:
        """A ThreadPoolExecutor."""
        return Executor(self, *args, **options)

    # -- what happens in which order -------------------------------------------------------------------------------

    def host(self) -> Line:
        """The line of this thread."""
        if not hasattr(self._of_thread, "line"):
            self._of_thread.line = Line(f"thread {threading.current_thread().name}")
        return self._of_thread.line

    def problem(self, what: str) -> None:
        """Note a problem and the line of the package that it was seen in."""
        frames = [frame for frame in traceback.extract_stack() if PACKAGE in frame.filename]
        place = f"{frames[-1].filename.rpartition(PACKAGE)[2]}:{frames[-1].lineno}" if frames else "in the test"
        self.problems.append(f"{what} ({place})")

    def forbid_in_capture(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def new_stream(self, device=None, **_) -> Stream:
        self.streams.append(Stream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    def current_stream(self, device=None) -> Stream:
        return getattr(self._of_thread, "stream", self.default_stream)

    @contextmanager
    def stream(self, stream: Stream):
        before, self._of_thread.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    def synchronize(self, device=None) -> None:
        self.forbid_in_capture("torch.cuda.synchronize")
        for stream in self.streams:
            self.host().wait_for(stream.line.clock)

    def launch(self) -> tuple[Line, object]:
        """New work on the current stream: it begins after all that this thread has seen."""
        line = self.current_stream().line
        line.wait_for(self.host().clock)
        return line, line.tick()

    def host_reads(self, tensor: Tracked) -> None:
        host = self.host()
        Access(tensor).happens(host, host.tick(), writes=False)

    def host_writes(self, tensor: Tracked) -> None:
        """For code outside PyTorch that writes into pinned memory."""
        host = self.host()
        Access(tensor).happens(host, host.tick(), writes=True)

    # -- operators -------------------------------------------------------------------------------------------------

    def run(self, function, args, kwargs):
        """Compute an operator on the inner tensors, and note what it reads and writes on its line."""
        if _is_composite(function):
            with _Mode(self):  # in inference mode they come undivided
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        inputs = [x for x in tensors if isinstance(x, Tracked)]
        device, pinned = kwargs.get("device"), kwargs.get("pin_memory", False)
        on_device = any(x.memory.owner is not None for x in inputs)
        to_device = on_device if device is None else torch.device(device).type == "cuda"
        if not inputs and not to_device and not pinned:
            return function(*args, **kwargs)
        written = self._written(function, args, kwargs)
        inner_kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        if device is not None:
            inner_kwargs["device"] = CPU
        inner_args, inner_kwargs = mapped(lambda x: x.inner if isinstance(x, Tracked) else x, (args, inner_kwargs))
        graph = self.capturing if on_device or to_device else None
        with _disable_current_modes():
            if graph is None:
                out = function(*inner_args, **inner_kwargs)
            else:
                out = graph.record(function, inner_args, inner_kwargs, [x.inner for x in written])
        name = function._schema.name
        if name == "aten::copy_" and args[0].device.type == "cpu":
            to_device = False
        nonblocking = kwargs.get("non_blocking", False) or (name == "aten::copy_" and args[2:] == (True,))
        is_device_work = on_device or to_device
        places = {x.device.type for x in tensors}
        moves = name in ("aten::_to_copy", "aten::copy_") and (len(places) == 2 or places == {"cpu"} or not to_device)
        waits = is_device_work and (
            (moves and not nonblocking)
            or name in WAITS
            or not (written or any(isinstance(x, torch.Tensor) for x in leaves(out)))
        )
        known = {x.inner.untyped_storage().data_ptr(): x.memory for x in inputs if x.inner.numel()}

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            memory = known.get(x.untyped_storage().data_ptr()) if x.numel() else None
            if memory is None:
                if not to_device and not (is_device_work and nonblocking) and not pinned:
                    return x  # of the host, and written when the host goes on
                memory = Memory(self, self.current_stream().line if to_device else None)
                fresh.append(memory)
                if graph is not None and to_device:
                    memory.graph = graph
            return Tracked(x, memory)

        fresh: list[Memory] = []
        wrapped = mapped(wrap, out)
        outputs = [x for x in leaves(wrapped) if isinstance(x, Tracked) and x.memory in fresh]
        reads, writes = [Access(x) for x in inputs], [Access(x) for x in [*written, *outputs]]
        is_view = not writes and any(isinstance(x, Tracked) for x in leaves(wrapped))
        if graph is not None:
            if waits:
                self.forbid_in_capture(str(function))
            graph.note(reads, writes)
        elif not is_view:
            host = self.host()
            line, moment = self.launch() if is_device_work else (host, host.tick())
            for access in reads:
                self._check_recording(access.memory)
                access.happens(line, moment, writes=False)
            for access in writes:
                access.happens(line, moment, writes=True)
            if waits:
                host.wait_for(line.clock)
        return return_and_correct_aliasing(function, args, kwargs, wrapped)

    def _written(self, function, args, kwargs) -> list[Tracked]:
        """The arguments that an operator writes into."""
        names, marked = _arguments(function)
        if not marked:
            return []
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return [x for name in marked for x in leaves(given.get(name)) if isinstance(x, Tracked)]

    def _check_recording(self, memory: Memory) -> None:
        if isinstance(memory.graph, CUDAGraph) and memory.graph.is_overwritten:
            self.problem("read from a recording's memory after another recording of its pool has run")


@cache
def _is_composite(function) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


@cache
def _arguments(function) -> tuple[list[str], list[str]]:
    """The names of an operator's arguments, and of those that it writes into."""
    arguments = function._schema.arguments
    marked = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [a.name for a in arguments], [*marked, *UNMARKED.get(function._schema.name, ())]
