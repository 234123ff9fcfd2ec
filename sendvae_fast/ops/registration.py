"""Giving the ops of both namespaces, which share one schema, their fake implementations and autograd formulas.

The compiled libraries define `torch.ops.sendvae.<op>`, the Triton modules `torch.ops.sendvae_triton.<op>`.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from sendvae_fast.ops import library
from sendvae_fast.ops.dispatch import OPS, compiled_op_is_defined, has_triton


def op_of(name: str, backend: str) -> Any:
    """`torch.ops.<namespace>.<name>` of a backend that is not the reference."""
    namespace = torch.ops.sendvae_triton if backend == "triton" else torch.ops.sendvae
    return getattr(namespace, name)


def register(
    op: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register `op`, and `<op>_backward` if it has a gradient, in every namespace that defines it here.

    fake, fake_backward: the outputs' metadata, with the arguments of the op and of its backward op.
    setup_context, backward: as for `torch.library.register_autograd`, but `backward` takes the backward op of the
        namespace as its first argument, so that a gradient is computed by the backend of its forward pass.
    """
    for namespace in _namespaces(op):
        torch.library.register_fake(f"{namespace}::{op}", fake)
        if backward is None:
            continue
        torch.library.register_fake(f"{namespace}::{op}_backward", fake_backward)
        backward_op = getattr(getattr(torch.ops, namespace), f"{op}_backward")
        torch.library.register_autograd(
            f"{namespace}::{op}", partial(backward, backward_op), setup_context=setup_context
        )


def _namespaces(op: str) -> Iterator[str]:
    if library.load() and compiled_op_is_defined(op):
        yield "sendvae"
    if "triton" in OPS[op] and has_triton():
        importlib.import_module(f"sendvae_fast.ops.triton.{op}")  # defines the ops
        yield "sendvae_triton"
