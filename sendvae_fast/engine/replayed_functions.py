"""Functions of tensors that are recorded once and replayed.

With `engine.streams.CudaGraphRecorder` as CUDA graphs, which cost the host one launch each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Results = TypeVar("Results")


class Recorder(Protocol):
    """What runs work, and records it."""

    def active(self) -> AbstractContextManager[object]:
        """A context in which work runs where it is recorded later: libraries prepare themselves there."""
        ...

    def run(self, work: Callable[[], Results]) -> Results:
        """Run `work` in that context; its results are the caller's."""
        ...

    def record(self, work: Callable[[], Results]) -> Callable[[], Results]:
        """Record `work`, which reads the same tensors every time, and return the function that carries it out.

        What that returns holds until the next recording is made or carried out.
        """
        ...


class Replayed:
    """`function` of tensors, which after a few calls of a kind is replayed from a recording, with the same results.

    A kind of call is the shapes and dtypes of its tensors and the decisions of the host, for a recording keeps what the
    host decided. The first calls of a kind run as they are, where they will be recorded: libraries choose their kernels
    and take their workspaces then. `function` may change other tensors in place (weights, optimizer state), but not
    exchange them, and must read nothing on the host.

    Args:
        function: takes tensors (or None) by position, the host's decisions (hashable) by keyword; gives tensors, in
            any nest of tuples, lists and dicts.
        recorder: `engine.streams.CudaGraphRecorder`.
        device: where the recordings' inputs lie.
        num_first_calls: calls of a kind before it is recorded.
    """

    def __init__(
        self, function: Callable[..., Any], recorder: Recorder, device: torch.device, num_first_calls: int
    ) -> None:
        self._function, self._recorder, self._device = function, recorder, device
        self._num_first_calls = num_first_calls
        self._kinds: dict[Hashable, _Kind] = {}

    @property
    def num_recordings(self) -> int:
        """Recordings made so far."""
        return sum(kind.replay is not None for kind in self._kinds.values())

    def __call__(self, *inputs: Tensor | None, **decisions: Hashable) -> Any:
        """The function's results, the caller's own. Inputs may be on the host: they are copied to the device."""
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        key = shapes, tuple(sorted(decisions.items()))
        if key not in self._kinds:
            self._kinds[key] = _Kind(inputs, self._device)
        kind = self._kinds[key]
        kind.fill(inputs)

        def work() -> Any:
            return self._function(*kind.inputs, **decisions)

        if kind.num_calls < self._num_first_calls:
            kind.num_calls += 1
            return self._recorder.run(work)
        if kind.replay is None:
            kind.replay = self._recorder.record(work)
        return tree_map_only(Tensor, torch.clone, kind.replay())


class _Kind:
    """Calls with tensors of the same shapes and the same decisions, and their recording."""

    def __init__(self, inputs: tuple[Tensor | None, ...], device: torch.device) -> None:
        self.inputs = [None if x is None else torch.empty_like(x, device=device) for x in inputs]
        self.num_calls = 0
        self.replay: Callable[[], Any] | None = None

    def fill(self, given: tuple[Tensor | None, ...]) -> None:
        """Copy a call's tensors over the last one's."""
        for own, x in zip(self.inputs, given, strict=True):
            if own is not None and x is not None:
                own.copy_(x, non_blocking=True)
