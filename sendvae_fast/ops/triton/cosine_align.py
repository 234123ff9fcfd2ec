"""Triton kernels of `cosine_align`: one launch forward, one backward.

The mean, where it is asked for, is PyTorch's: to join it takes a counter of the programs that have ended, which
somebody would have to clear.

A program takes NUM_ROWS rows (patches) and walks over their D columns in steps of NUM_COLUMNS, accumulating in float32.
Rows are read through a row stride.
"""

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from sendvae_fast.ops.dispatch import interpreting_triton

# D of the usual foundation models (384, 768, 1024) is a small multiple of 128 or 256; Triton's 4 warps read 4 rows at a
# time.
NUM_ROWS, NUM_COLUMNS = 8, 256

_define_op = custom_op if interpreting_triton() else triton_op


@triton.jit
def _forward_kernel(
    features_ptr, target_ptr, distance_ptr, stats_ptr,
    num_rows, num_columns, features_stride, target_stride, eps, offset,
    HAS_MARGIN: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    row_mask = row < num_rows
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)  # Inductor may pass float64 scalars
    dot = tl.zeros([NUM_ROWS, NUM_COLUMNS], tl.float32)
    features_square = tl.zeros([NUM_ROWS, NUM_COLUMNS], tl.float32)
    target_square = tl.zeros([NUM_ROWS, NUM_COLUMNS], tl.float32)
    for start in range(0, num_columns, NUM_COLUMNS):
        column = start + tl.arange(0, NUM_COLUMNS)
        mask = row_mask[:, None] & (column < num_columns)[None, :]
        features = tl.load(features_ptr + row[:, None] * features_stride + column[None, :], mask=mask, other=0.0)
        target = tl.load(target_ptr + row[:, None] * target_stride + column[None, :], mask=mask, other=0.0)
        features, target = features.to(tl.float32), target.to(tl.float32)
        dot += features * target
        features_square += features * features
        target_square += target * target
    dot = tl.sum(dot, axis=1)
    features_norm = tl.sqrt_rn(tl.sum(features_square, axis=1))
    target_norm = tl.sqrt_rn(tl.sum(target_square, axis=1))
    # Comparisons, not maximum: they pass NaN on.
    features_floored = tl.where(features_norm < eps, eps, features_norm)
    target_floored = tl.where(target_norm < eps, eps, target_norm)
    # Two divisions: the product of the norms can overflow where the cosine does not.
    distance = offset - tl.div_rn(tl.div_rn(dot, features_floored), target_floored)
    if HAS_MARGIN:
        distance = tl.where(distance <= 0.0, 0.0, distance)
    tl.store(distance_ptr + row, distance, mask=row_mask)
    tl.store(stats_ptr + row * 3, dot, mask=row_mask)
    tl.store(stats_ptr + row * 3 + 1, features_norm, mask=row_mask)
    tl.store(stats_ptr + row * 3 + 2, target_norm, mask=row_mask)


@triton.jit
def _backward_kernel(
    grad_ptr, features_ptr, target_ptr, stats_ptr, grad_features_ptr, grad_target_ptr,
    num_rows, num_columns, grad_stride, features_stride, target_stride, eps, offset,
    OF_MEAN: tl.constexpr, HAS_MARGIN: tl.constexpr, NEED_TARGET: tl.constexpr,
    NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    row_mask = row < num_rows
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)  # Inductor may pass float64 scalars
    grad = tl.load(grad_ptr + row * grad_stride, mask=row_mask, other=0.0)
    if OF_MEAN:
        grad = tl.div_rn(grad, tl.full([NUM_ROWS], 1.0, tl.float32) * num_rows)
    dot = tl.load(stats_ptr + row * 3, mask=row_mask, other=0.0)
    features_norm = tl.load(stats_ptr + row * 3 + 1, mask=row_mask, other=1.0)
    target_norm = tl.load(stats_ptr + row * 3 + 2, mask=row_mask, other=1.0)
    features_floored = tl.where(features_norm < eps, eps, features_norm)
    target_floored = tl.where(target_norm < eps, eps, target_norm)
    cosine = tl.div_rn(tl.div_rn(dot, features_floored), target_floored)
    if HAS_MARGIN:
        grad = tl.where(offset - cosine <= 0.0, 0.0, grad)
    across = tl.div_rn(tl.div_rn(-grad, features_floored), target_floored)
    # Up to eps the norm counts as a constant, and this term is gone.
    features_along = tl.where(
        features_norm <= eps, 0.0, tl.div_rn(tl.div_rn(grad * cosine, features_floored), features_floored)
    )
    target_along = tl.where(
        target_norm <= eps, 0.0, tl.div_rn(tl.div_rn(grad * cosine, target_floored), target_floored)
    )
    for start in range(0, num_columns, NUM_COLUMNS):
        column = start + tl.arange(0, NUM_COLUMNS)
        mask = row_mask[:, None] & (column < num_columns)[None, :]
        features = tl.load(features_ptr + row[:, None] * features_stride + column[None, :], mask=mask, other=0.0)
        target = tl.load(target_ptr + row[:, None] * target_stride + column[None, :], mask=mask, other=0.0)
        features, target = features.to(tl.float32), target.to(tl.float32)
        place = row[:, None] * num_columns + column[None, :]
        tl.store(grad_features_ptr + place, across[:, None] * target + features_along[:, None] * features, mask=mask)
        if NEED_TARGET:
            tl.store(grad_target_ptr + place, across[:, None] * features + target_along[:, None] * target, mask=mask)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [M, D] with unit stride along D, copied only if it has another."""
    return x if x.stride(1) == 1 else x.contiguous()


def _offset(margin: float | None) -> float:
    """The number that the cosine is subtracted from."""
    return 1.0 if margin is None else 1.0 - margin


@_define_op("sendvae_triton::cosine_align", mutates_args=())
def cosine_align(
    features: torch.Tensor, target: torch.Tensor, eps: float, margin: float | None, mean: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(distance [M], stats [M, 3] = (dot, |features|, |target|)), float32, of features and target [M, D].

    With `mean` the mean [] of the distances in their place.
    """
    num_rows, num_columns = features.shape
    distance = features.new_empty(num_rows, dtype=torch.float32)
    stats = features.new_empty((num_rows, 3), dtype=torch.float32)
    if num_rows == 0:
        return distance.mean() if mean else distance, stats
    features, target = _rows(features), _rows(target)
    kernel = _forward_kernel if interpreting_triton() else wrap_triton(_forward_kernel)
    with torch.cuda.device_of(features):
        kernel[(triton.cdiv(num_rows, NUM_ROWS),)](
            features, target, distance, stats, num_rows, num_columns, features.stride(0), target.stride(0), eps,
            _offset(margin), HAS_MARGIN=margin is not None, NUM_ROWS=NUM_ROWS, NUM_COLUMNS=NUM_COLUMNS,
        )  # fmt: skip
    return distance.mean() if mean else distance, stats


@_define_op("sendvae_triton::cosine_align_backward", mutates_args=())
def cosine_align_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    target: torch.Tensor,
    stats: torch.Tensor,
    eps: float,
    margin: float | None,
    need_target: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_features [M, D], grad_target [M, D], or [0] unless need_target); grad is float32 [M], or [] of the mean."""
    num_rows, num_columns = features.shape
    of_mean = grad.dim() == 0
    grad_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    grad_target = (
        torch.empty_like(target, memory_format=torch.contiguous_format) if need_target else target.new_empty(0)
    )
    if num_rows == 0:
        return grad_features, grad_target
    features, target = _rows(features), _rows(target)
    kernel = _backward_kernel if interpreting_triton() else wrap_triton(_backward_kernel)
    with torch.cuda.device_of(features):
        kernel[(triton.cdiv(num_rows, NUM_ROWS),)](
            grad, features, target, stats.contiguous(), grad_features, grad_target,
            num_rows, num_columns, 0 if of_mean else grad.stride(0), features.stride(0), target.stride(0), eps,
            _offset(margin), OF_MEAN=of_mean, HAS_MARGIN=margin is not None, NEED_TARGET=need_target,
            NUM_ROWS=NUM_ROWS, NUM_COLUMNS=NUM_COLUMNS,
        )  # fmt: skip
    return grad_features, grad_target
