"""Patch-wise cosine distance between two feature maps, without materialising normalised features.

N tokens (patches), D width, M rows: all leading dimensions flattened.
"""

import math
from typing import Literal

import torch

from sendvae_fast.ops.dispatch import backend_for
from sendvae_fast.ops.registration import register


def cosine_align(
    features: torch.Tensor,
    target: torch.Tensor,
    *,
    reduction: Literal["none", "sample", "mean"] = "mean",
    eps: float = 1e-8,
    margin: float | None = None,
) -> torch.Tensor:
    """One minus the cosine similarity of each patch.

        cos = <f, y> / (max(|f|, eps) max(|y|, eps))
        distance = 1 - cos, or max(0, 1 - margin - cos) with a margin

    The mean is Eq. 2 of the Send-VAE paper; REPA minimises the same thing without the constant 1. With a margin it is
    VA-VAE's marginal cosine similarity loss (arXiv:2501.01423; its last stage of training has 0.5): a patch as close as
    the margin asks is left alone, with gradient 0 at the margin itself. Sums over D are float32 (float64 for float64
    inputs), whatever the inputs' dtype or autocast.

    Gradients reach features, and target if it requires them, once (no double backward; the reference has it). Besides
    the inputs the backward pass keeps three float32 numbers per row. A norm up to eps counts as the constant eps.

    Memory traffic of the compiled and Triton backends, s the bytes of an element: 2 s M D forward, 3 s M D backward
    (4 s M D with a gradient for target). Rows that do not lie at one stride are copied first. On CUDA the mean over
    everything is made in the same launch, in Triton by PyTorch.

    Args:
        features: [..., N, D], float32, bfloat16, float16 or float64 (reference only); any layout, any dimension but D
            may be 0.
        target: like features. If the dtypes differ, both are first promoted to the wider one (a copy).
        reduction: "none" gives [..., N]; "sample" the mean over N, [...]; "mean" the mean over everything, a scalar
            (NaN when there is nothing, as for torch.mean).
        eps: lower bound of a norm, positive.
        margin: distance that counts as none, finite; None: no margin and no lower bound (rounding can make the distance
            of parallel patches slightly negative). 0 differs from None in that bound only.

    Returns:
        float32 tensor (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices that differ, fewer than 2 dimensions, D of 0, a dtype that is not floating point,
            an unknown reduction, an eps that is not positive, a margin that is not finite.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    _check(features, target, reduction, eps, margin)
    dtype = torch.promote_types(features.dtype, target.dtype)
    features, target = features.to(dtype), target.to(dtype)
    backend = backend_for("cosine_align", features)
    if backend == "reference":
        return cosine_align_reference(features, target, reduction=reduction, eps=eps, margin=margin)
    width = features.shape[-1]
    rows = features.reshape(-1, width), target.reshape(-1, width)
    (distance,) = _op.with_gradient(backend, 1, *rows, eps, margin, reduction == "mean")
    if reduction == "mean":
        return distance
    distance = distance.view(features.shape[:-1])
    return distance if reduction == "none" else distance.mean(-1)


def cosine_align_reference(
    features: torch.Tensor,
    target: torch.Tensor,
    *,
    reduction: Literal["none", "sample", "mean"] = "mean",
    eps: float = 1e-8,
    margin: float | None = None,
) -> torch.Tensor:
    """`cosine_align` in plain, differentiable PyTorch; float64 inputs are computed in float64 throughout."""
    compute = torch.promote_types(torch.promote_types(features.dtype, target.dtype), torch.float32)
    f, y = features.to(compute), target.to(compute)
    f_norm, y_norm = (torch.linalg.vector_norm(x, dim=-1) for x in (f, y))
    # Not clamp_min: its gradient at eps itself depends on the version of PyTorch. Here it is 0.
    f_norm, y_norm = (torch.where(norm <= eps, eps, norm) for norm in (f_norm, y_norm))
    # Two divisions: the product of the norms can overflow where the cosine does not.
    cosine = (f * y).sum(-1) / f_norm / y_norm
    distance = 1.0 - cosine if margin is None else torch.relu((1.0 - margin) - cosine)
    if reduction == "none":
        return distance
    return distance.mean(-1) if reduction == "sample" else distance.mean()


def _check(features: torch.Tensor, target: torch.Tensor, reduction: str, eps: float, margin: float | None) -> None:
    if features.dim() < 2 or features.shape[-1] == 0:
        raise ValueError(f"features must be [..., N, D] with D > 0, got {list(features.shape)}")
    if features.shape != target.shape:
        raise ValueError(f"features {list(features.shape)} and target {list(target.shape)} must have one shape")
    if features.device != target.device:
        raise ValueError(f"target is on {target.device}, features on {features.device}: put both on one device")
    for name, tensor in (("features", features), ("target", target)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if reduction not in ("none", "sample", "mean"):
        raise ValueError(f'reduction must be "none", "sample" or "mean", got {reduction!r}')
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"margin must be finite or None, got {margin}")


def _fake(features, target, eps, margin, mean):
    num_rows = features.shape[0]
    distance = features.new_empty(() if mean else num_rows, dtype=torch.float32)
    return distance, features.new_empty((num_rows, 3), dtype=torch.float32)


def _fake_backward(grad, features, target, stats, eps, margin, need_target):
    grad_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    return grad_features, torch.empty_like(grad_features) if need_target else target.new_empty(0)


def _setup_context(ctx, inputs, output):
    features, target, eps, margin, _ = inputs
    _, stats = output
    ctx.save_for_backward(features, target, stats)
    ctx.eps, ctx.margin = eps, margin


def _backward(op, ctx, grad, _grad_stats):
    need_target = ctx.needs_input_grad[1]
    grad_features, grad_target = op(grad, *ctx.saved_tensors, ctx.eps, ctx.margin, need_target)
    return grad_features, grad_target if need_target else None, None, None, None


_op = register(
    "cosine_align",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    without_gradient=lambda inputs, output: output[-1:],
)
