"""Registration of fake implementations and autograd formulas for the ops of both namespaces, which share one schema.

The compiled libraries define `torch.ops.sendvae.<op>`, the Triton modules `torch.ops.sendvae_triton.<op>`. These are
imported, and Triton with them, when the first op runs on Triton.
"""

import importlib
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch

from sendvae_fast.ops import library
from sendvae_fast.ops.dispatch import compiled_op_is_defined
from sendvae_fast.ops.tracing import constant_when_traced

_register_triton: dict[str, Callable[[], None]] = {}  # by op; gone once it has run
_one_at_a_time = Lock()


def op_of(name: str, backend: str) -> Any:
    """`torch.ops.<namespace>.<name>` of a backend that is not the reference."""
    if backend == "triton":
        _define_triton_op(name)
        return getattr(torch.ops.sendvae_triton, name)
    return getattr(torch.ops.sendvae, name)


def register(
    op: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register `op`, and `<op>_backward` if it has a gradient, in every namespace: in Triton's when first needed.

    fake, fake_backward: the outputs' metadata, with the arguments of the op and of its backward op.
    setup_context, backward: as for `torch.library.register_autograd`, but `backward` takes the backward op of the
        namespace as its first argument, so that a gradient is computed by the backend of its forward pass.
    """

    def register_in(namespace: str) -> None:
        torch.library.register_fake(f"{namespace}::{op}", fake)
        if backward is None:
            return
        torch.library.register_fake(f"{namespace}::{op}_backward", fake_backward)
        backward_op = getattr(getattr(torch.ops, namespace), f"{op}_backward")
        torch.library.register_autograd(
            f"{namespace}::{op}", partial(backward, backward_op), setup_context=setup_context
        )

    if library.load() and compiled_op_is_defined(op):
        register_in("sendvae")
    _register_triton[op] = partial(register_in, "sendvae_triton")


# Dynamo calls this while tracing, where an import would not be followed.
@constant_when_traced
def _define_triton_op(op: str) -> None:
    with _one_at_a_time:
        if op in _register_triton:
            importlib.import_module(f"sendvae_fast.ops.triton.{op}")
            _register_triton.pop(op)()
