"""The L2 norm of many tensors as if they were one: the gradient norm of a training step."""

from collections.abc import Sequence

import torch

from sendvae_fast.ops.dispatch import backend_for
from sendvae_fast.ops.layout import is_channels_last
from sendvae_fast.ops.registration import register


@torch.no_grad()
def global_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of all elements of all tensors.

        norm = sqrt(sum over tensors and elements of x^2)

    Sums are float64 and in a fixed order: the result repeats bit for bit, and it is infinite or NaN only when an
    element is, or when the norm itself is beyond float32. It stays on the device, where `adamw_ema_` clips by it and
    skips the step. No gradient.

    Memory traffic: one read of the tensors. Tensors neither contiguous nor channels-last are copied first.

    There is no Triton backend: Triton has no array of pointers as an argument, so each tensor would take a launch of
    its own, and hundreds of small ones are what this op is there to avoid.

    Args:
        tensors: of one dtype (float32, bfloat16, float16, or float64: reference only) on one device, any shapes.

    Returns:
        float32 scalar tensor (float64 for float64 tensors) on their device; 0 on the CPU for no tensors at all.

    Raises:
        ValueError: tensors of several dtypes or devices, or of a dtype that is not floating point.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    if not tensors:
        return torch.zeros(())
    _check(tensors)
    backend = backend_for("global_norm", tensors[0])
    if backend == "reference":
        return global_norm_reference(tensors)
    in_memory_order = [x.permute(0, 2, 3, 1) if is_channels_last(x) else x for x in tensors]
    return _op(backend, [x.contiguous() for x in in_memory_order])


def global_norm_reference(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`global_norm` in plain PyTorch, for at least one tensor; differentiable."""
    norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors])
    return torch.linalg.vector_norm(norms).to(torch.promote_types(tensors[0].dtype, torch.float32))


def _check(tensors: Sequence[torch.Tensor]) -> None:
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"tensors must be float32, bfloat16, float16 or float64, got {dtype}")
    for x in tensors:
        if x.dtype != dtype or x.device != device:
            raise ValueError(
                f"tensors must be of one dtype on one device, got {dtype} on {device} and {x.dtype} on {x.device}"
            )


def _fake(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


_op = register("global_norm", fake=_fake)
