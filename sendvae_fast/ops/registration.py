"""Registration of fake implementations and autograd formulas for the ops of both namespaces, which share one schema.

The compiled libraries define `torch.ops.sendvae.<op>`, the Triton modules `torch.ops.sendvae_triton.<op>`. These are
imported, and Triton with them, when the first op runs on Triton.

An op is registered with PyTorch for those who trace programs: torch.compile, torch.export. A call that nobody
traces does not go that way, on which PyTorch's Python code takes longer than a small kernel runs: `FusedOp`
calls the kernel below autograd, within an `autograd.Function` where a gradient may be wanted.
"""

import importlib
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from sendvae_fast.ops import library
from sendvae_fast.ops.dispatch import compiled_op_is_defined
from sendvae_fast.ops.tracing import constant_when_traced

# As torch.library itself calls an op below its autograd formula.
_below_autograd = torch._C._AutoDispatchBelowAutograd

_register_triton: dict[str, Callable[[], None]] = {}  # by op; gone once it has run
_one_at_a_time = Lock()


def op_of(name: str, backend: str) -> Any:
    """`torch.ops.<namespace>.<name>` of a backend that is not the reference."""
    if backend == "triton":
        _define_triton_op(name)
        return getattr(torch.ops.sendvae_triton, name)
    return getattr(torch.ops.sendvae, name)


class FusedOp:
    """An op on all backends but the reference, as its public function calls it.

    Args:
        name: the op's, in both namespaces.
        setup_context: see `register`, like `backward`; None for an op without a gradient.
    """

    def __init__(
        self,
        name: str,
        setup_context: Callable[..., None] | None,
        backward: Callable[..., Any] | None,
    ) -> None:
        self.name, self.setup_context, self.backward = name, setup_context, backward
        self._kernels: dict[str, Callable[..., Any]] = {}  # by backend
        self._functions: dict[tuple[str, int], Callable[..., Any]] = {}  # by backend and number of outputs

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """The outputs of the op for the arguments of its schema, without a gradient."""
        if torch.compiler.is_compiling():
            return op_of(self.name, backend)(*arguments)
        kernel = self._kernels.get(backend) or self._find_kernel(backend)
        with _below_autograd():
            return kernel(*arguments)

    def with_gradient(self, backend: str, num_outputs: int, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """The first `num_outputs` outputs of the op, through which gradients go."""
        if torch.compiler.is_compiling():
            return op_of(self.name, backend)(*arguments)[:num_outputs]
        if torch.is_grad_enabled():
            function = self._functions.get((backend, num_outputs)) or self._make_function(backend, num_outputs)
            return function(*arguments)
        kernel = self._kernels.get(backend) or self._find_kernel(backend)
        with _below_autograd():
            return kernel(*arguments)[:num_outputs]

    def _find_kernel(self, backend: str) -> Callable[..., Any]:
        kernel = self._kernels[backend] = op_of(self.name, backend).default._op
        return kernel

    def _make_function(self, backend: str, num_outputs: int) -> Callable[..., Any]:
        """`apply` of an `autograd.Function` of this op, and of its backward op on the same backend."""
        assert self.setup_context is not None and self.backward is not None
        kernel, setup_context, backward = self._find_kernel(backend), self.setup_context, self.backward
        backward_op = op_of(f"{self.name}_backward", backend)
        backward_kernel = backward_op.default._op
        hidden = (None,) * (len(op_of(self.name, backend).default._schema.returns) - num_outputs)

        def run(ctx: FunctionCtx, *arguments: Any) -> tuple[torch.Tensor, ...]:
            with _below_autograd():
                outputs = kernel(*arguments)
            setup_context(ctx, arguments, outputs)
            return outputs[:num_outputs]

        def differentiate(ctx: FunctionCtx, *grads: torch.Tensor | None) -> Any:
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                # A graph of the gradient is wanted: PyTorch says that there is none.
                return backward(backward_op, ctx, *grads, *hidden)
            with _below_autograd():
                return backward(backward_kernel, ctx, *grads, *hidden)

        methods = {"forward": staticmethod(run), "backward": staticmethod(differentiate)}
        function: Any = type(self.name, (torch.autograd.Function,), methods)
        # What the engine calls looks `backward` up at each call, in Python: a twentieth of a small one's time.
        function._backward_cls.apply = differentiate
        self._functions[backend, num_outputs] = function.apply
        return function.apply


def register(
    op: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    without_gradient: Callable[[Any, Any], tuple[torch.Tensor, ...]] = lambda inputs, output: (),
) -> FusedOp:
    """Register `op`, and `<op>_backward` if it has a gradient, in every namespace: in Triton's when first needed.

    fake, fake_backward: the outputs' metadata, with the arguments of the op and of its backward op.
    setup_context, backward: as for `torch.library.register_autograd`, but `backward` takes the backward op of the
        namespace as its first argument, so that a gradient is computed by the backend of its forward pass. Both are
        given all outputs of the op and a gradient, or None, for each, also where the caller is given fewer.
    without_gradient: of the op's inputs and outputs, those outputs that are for its backward pass alone. Marking them
        takes time, and those who call a `FusedOp` are not given them.
    """

    def setup_traced(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        assert setup_context is not None
        setup_context(ctx, inputs, output)
        if kept := without_gradient(inputs, output):
            ctx.mark_non_differentiable(*kept)

    def register_in(namespace: str) -> None:
        torch.library.register_fake(f"{namespace}::{op}", fake)
        if backward is None:
            return
        torch.library.register_fake(f"{namespace}::{op}_backward", fake_backward)
        backward_op = getattr(getattr(torch.ops, namespace), f"{op}_backward")
        torch.library.register_autograd(
            f"{namespace}::{op}", partial(backward, backward_op), setup_context=setup_traced
        )

    if library.load() and compiled_op_is_defined(op):
        register_in("sendvae")
    _register_triton[op] = partial(register_in, "sendvae_triton")
    return FusedOp(op, setup_context, backward)


# Dynamo calls this while tracing, where an import would not be followed.
@constant_when_traced
def _define_triton_op(op: str) -> None:
    with _one_at_a_time:
        if op in _register_triton:
            importlib.import_module(f"sendvae_fast.ops.triton.{op}")
            _register_triton.pop(op)()
