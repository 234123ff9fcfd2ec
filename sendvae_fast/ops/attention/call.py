"""Attention through whichever library is fastest for the shape: one entry for mapper, SiT and the VAE.

B batch, N tokens.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sendvae_fast.ops import dispatch
from sendvae_fast.ops.attention import table as attention_table
from sendvae_fast.ops.attention.backends import BACKENDS, unavailable, unsupported
from sendvae_fast.ops.forcing import ForcedChoice, cannot_run
from sendvae_fast.ops.tracing import constant_when_traced

_forced = ForcedChoice("SENDVAE_ATTENTION", "use_attention", "attention backend", BACKENDS)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without mask or dropout.

        attention = softmax(q k^T / sqrt(head_dim)) v

    The fused kernels never write the N x N matrix: 4 B heads N head_dim elements are moved forward, the minimum.

    Which backend (`backends`) computes it: the one that `use_attention` or SENDVAE_ATTENTION forces; else the
    fastest in this device's table for (dtype, head_dim, N, heads, B up to a power of two, with or without gradients),
    which `tune_attention` or `sendvae doctor --tune_attention` measures; else, and wherever plain PyTorch is forced by
    SENDVAE_BACKEND=reference, PyTorch's own choice. A call measures nothing: all ranks of a run, and a run and
    its continuation, take the same kernels unless someone measures in between. Under torch.compile the choice is made
    while tracing, and again when `use_attention` has changed it.

    The library decides whether the gradient repeats bit for bit: with `torch.use_deterministic_algorithms` the
    packages' flash attention is asked for its deterministic form, and PyTorch's kernels do what they document. NaN goes
    through, with one exception seen in PyTorch 2.15: its flash attention for the CPU makes zeros of the row whose q has
    NaN. (NaN in the same token's k or v still makes NaN of the other rows.)

    Args:
        q: [B, heads, N, head_dim], floating point; any layout, B and N may be 0.
        k: like q.
        v: like q.

    Returns:
        Like q; the layout is the backend's.

    Raises:
        ValueError: shapes, dtypes or devices differ, not 4 dimensions, a dtype that is not floating point.
        UserError: the forced backend is unknown or cannot run, and why.
    """
    _check(q, k, v)
    forced, source = _forced.resolve(_forced.name)
    if forced is None:
        return BACKENDS[_choose(q, k, v)].run(q, k, v)
    reason = _unavailable(forced, q.device.type, q.device.index)
    reason = reason or unsupported(forced, q.device.type, q.dtype, q.shape[-1])
    if reason is None and torch.compiler.is_compiling():
        return BACKENDS[forced].run(q, k, v)
    if reason is None:
        try:
            return BACKENDS[forced].run(q, k, v)
        except RuntimeError as error:
            if not str(error).startswith(("No available kernel", "No viable backend")):
                raise
            reason = f"PyTorch has no such kernel for {q.dtype} {list(q.shape)}"
    raise cannot_run("attention", forced, source, reason)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` in plain, differentiable PyTorch; float32 inside, float64 for float64 inputs."""
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(compute) @ k.to(compute).mT / q.shape[-1] ** 0.5  # [B, heads, N, N]
    return (torch.softmax(scores, dim=-1) @ v.to(compute)).to(q.dtype)


def use_attention(name: str) -> AbstractContextManager[None]:
    """Force the backend of `attention` inside the `with` block; it outranks SENDVAE_ATTENTION, blocks nest.

    The setting is the process's, not the thread's. A backward pass is computed by the backend of its forward pass.

    Raises:
        UserError: `name` is not a backend. That it cannot run is reported by the call that needs it.
    """
    return _forced.use(name)


def available_attention(device: torch.device | str) -> dict[str, str | None]:
    """Every backend: None if it takes tensors of `device`, else the reason. Dtype and head dim may exclude it, too."""
    device = torch.device(device)
    return {name: unavailable(name, device.type, device.index) for name in BACKENDS}


def _choose(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The fastest backend that was measured, or "sdpa"."""
    if dispatch.forced_backend() == "reference":
        return "sdpa"
    batch, heads, tokens, head_dim = q.shape
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # Compared one by one: of a size that torch.compile keeps symbolic, only the answers become guards.
    for choice in _choices(q.device.type, q.device.index):
        if (
            choice.tokens == tokens and choice.head_dim == head_dim and choice.heads == heads
            and choice.dtype == q.dtype and choice.training == training
            and choice.batch_class < 2 * batch <= 2 * choice.batch_class
        ):  # fmt: skip
            return choice.traced if torch.compiler.is_compiling() else choice.eager
    return "sdpa"


# Dynamo calls these two while tracing and burns the answers into the graph.
@constant_when_traced
def _choices(device_type: str, device_index: int | None) -> tuple[attention_table.Choice, ...]:
    return attention_table.choices(device_type, device_index)


@constant_when_traced
def _unavailable(name: str, device_type: str, device_index: int | None) -> str | None:
    return unavailable(name, device_type, device_index)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q must be floating point [B, heads, N, head_dim], got {q.dtype} {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be like q, {q.dtype} {list(q.shape)} on {q.device}, got {x.dtype} {list(x.shape)} on "
                f"{x.device}"
            )
