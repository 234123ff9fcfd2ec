"""What the tests of every op share: repeated runs compared with truth, and the protocol of an op's case module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from numerics import BACKWARD_FACTOR, FORWARD_FACTOR, assert_error_within

from sendvae_fast.errors import UserError
from sendvae_fast.ops import chosen_backend, use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_ELEMENTS = 128
"""A case with fewer outputs than this is repeated with other numbers until it has given as many."""


def require_backend(op: str, backend: str, device: str = "cpu") -> None:
    """Skip the test, with the reason, where the backend cannot run on tensors of the device."""
    try:
        with use_backend(backend):
            chosen = chosen_backend(op, device)
    except UserError as error:
        pytest.skip(str(error))
    if chosen != backend:
        pytest.skip(f"{op} on {device} takes {chosen}, not {backend}")


def by_turns(dtypes: tuple[torch.dtype, ...], number: int) -> tuple[torch.dtype, ...]:
    """The dtypes of a case with this number where half precisions take turns: Triton takes a second for each."""
    halves = [dtype for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)]
    left_out = halves[number % 2] if len(halves) == 2 else None
    return tuple(dtype for dtype in dtypes if dtype is not left_out)


def num_repeats(num_outputs: int, least: int = MIN_ELEMENTS) -> int:
    """How often a case of so many outputs is run, for at least `least` of them in all."""
    return 1 if num_outputs == 0 else -(-least // num_outputs)


@dataclass(frozen=True)
class Example:
    """A typical call, for what holds of every op: repeatability, threads, streams, graphs, compilation.

    function takes the tensors and returns a tuple of output tensors; gradients reach those of `tensors` that require
    one. Anything in `tensors` may be overwritten by the example of another number between two calls.
    """

    function: Callable[..., tuple[torch.Tensor, ...]]
    tensors: tuple[torch.Tensor, ...]

    def run(self, function: Callable[..., tuple[torch.Tensor, ...]] | None = None) -> tuple[torch.Tensor, ...]:
        """Outputs and the gradients of the sum of their squares, by `function` or a compiled form of it."""
        outputs = (function or self.function)(*self.tensors)
        leaves = [x for x in self.tensors if x.requires_grad]
        if not leaves:
            return outputs
        loss = sum(x.float().square().sum() for x in outputs if x.requires_grad)
        return *outputs, *torch.autograd.grad(loss, leaves)

    def overwrite(self, other: "Example") -> None:
        """Copy the values of another example into the memory of this one."""
        with torch.no_grad():
            for mine, new in zip(self.tensors, other.tensors, strict=True):
                mine.copy_(new)


@dataclass(frozen=True)
class OpTests:
    """What an op's case module gives the tests that hold for all ops (tests/ops/test_contract.py, tests/gpu).

    op: its name in `dispatch.OPS`.
    cases, few_cases: the whole matrix for compiled backends and GPUs, and a part of it for Triton's interpreter.
    check(case, dtype, backend, device): forward and backward of a backend against float64 truth.
    example(number, dtype, device): the same shapes for every number, other values.
    raw_calls(backend, device): (name of the raw op, its arguments) to be given to `torch.library.opcheck`.
    dtypes: the element types it computes in.
    no_cuda_graph: why it cannot be captured in a CUDA graph, where that is so.
    """

    op: str
    cases: list[Any]
    few_cases: list[Any]
    check: Callable[[Any, torch.dtype, str, str], None]
    example: Callable[[int, torch.dtype, str], Example]
    raw_calls: Callable[[str, str], list[tuple[str, tuple]]]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    no_cuda_graph: str | None = None


@dataclass
class Results:
    """Outputs and gradients of repeated runs, gathered by name for one comparison."""

    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    grads: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, outputs: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
        for gathered, new in ((self.outputs, outputs), (self.grads, grads)):
            for name, tensor in new.items():
                gathered.setdefault(name, []).append(tensor.detach())


def assert_op_within(actual: Results, plain: Results, truth: Results) -> None:
    for name in truth.outputs:
        assert_error_within(
            actual.outputs[name], plain.outputs[name], truth.outputs[name], FORWARD_FACTOR, f"output {name}"
        )
    for name in truth.grads:
        assert_error_within(
            actual.grads[name], plain.grads[name], truth.grads[name], BACKWARD_FACTOR, f"gradient of {name}"
        )
