"""Triton kernels of `adaln`: one launch forward, two backward.

Forward, a program takes one token. Backward, a program takes CHUNK tokens of one sample and keeps their part of the
modulation's gradients in registers; the second launch adds up the chunks in their order. A token is one block of WIDTH
columns, the last ones masked; tokens are read through two strides, modulation through one.
"""

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from sendvae_fast.ops.dispatch import interpreting_triton

# Long chunks make few partial sums, short ones many programs; 16 tokens are 16 programs for a sample of 256.
CHUNK = 16
# Columns of a program that adds up chunks.
NUM_COLUMNS = 256

_define_op = custom_op if interpreting_triton() else triton_op


@triton.jit
def _forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, y_ptr, s_ptr, stats_ptr,
    num_tokens, num_columns, x_stride_b, x_stride_n, branch_stride_b, branch_stride_n,
    gate_stride, shift_stride, scale_stride, eps,
    HAS_BRANCH: tl.constexpr, RMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // num_tokens
    token = row - sample * num_tokens
    column = tl.arange(0, WIDTH)
    mask = column < num_columns
    width = tl.cast(num_columns, tl.float32)
    eps = tl.cast(eps, tl.float32)  # Inductor may pass a float64 scalar
    s = tl.load(x_ptr + sample * x_stride_b + token * x_stride_n + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(
            branch_ptr + sample * branch_stride_b + token * branch_stride_n + column, mask=mask, other=0.0
        ).to(tl.float32)
        gate = tl.load(gate_ptr + sample * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        rounded = (s + gate * branch).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row * num_columns + column, rounded, mask=mask)
        s = rounded.to(tl.float32)  # y is the norm of what is stored
    if RMS:
        mean = 0.0
        variance = tl.div_rn(tl.sum(s * s, axis=0), width)
    else:
        center = tl.div_rn(tl.sum(s, axis=0), width)
        deviation = tl.where(mask, s - center, 0.0)
        # The center is the mean up to rounding; the rest is corrected here.
        correction = tl.div_rn(tl.sum(deviation, axis=0), width)
        mean = center + correction
        variance = tl.div_rn(tl.sum(deviation * deviation, axis=0), width) - correction * correction
        variance = tl.where(variance < 0.0, 0.0, variance)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(stats_ptr + row * 2, mean)
    tl.store(stats_ptr + row * 2 + 1, rstd)
    shift = tl.load(shift_ptr + sample * shift_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_stride + column, mask=mask, other=0.0).to(tl.float32)
    y = (s - mean) * rstd * (1.0 + scale) + shift
    tl.store(y_ptr + row * num_columns + column, y, mask=mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr, grad_s_ptr, s_ptr, branch_ptr, gate_ptr, scale_ptr, stats_ptr, grad_x_ptr, grad_branch_ptr,
    partials_ptr,
    num_tokens, num_columns, num_chunks,
    grad_y_stride_b, grad_y_stride_n, grad_s_stride_b, grad_s_stride_n, s_stride_b, s_stride_n,
    branch_stride_b, branch_stride_n, gate_stride, scale_stride,
    HAS_GRAD_S: tl.constexpr, HAS_BRANCH: tl.constexpr, RMS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // num_chunks
    begin = (program - sample * num_chunks) * CHUNK
    column = tl.arange(0, WIDTH)
    mask = column < num_columns
    width = tl.cast(num_columns, tl.float32)
    scale_plus_one = 1.0 + tl.load(scale_ptr + sample * scale_stride + column, mask=mask, other=0.0).to(tl.float32)
    shift_sum = tl.zeros([WIDTH], tl.float32)
    scale_sum = tl.zeros([WIDTH], tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + sample * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        gate_sum = tl.zeros([WIDTH], tl.float32)
    for token in range(begin, tl.minimum(begin + CHUNK, num_tokens)):
        row = sample * num_tokens + token
        mean = tl.load(stats_ptr + row * 2)
        rstd = tl.load(stats_ptr + row * 2 + 1)
        grad_y = tl.load(
            grad_y_ptr + sample * grad_y_stride_b + token * grad_y_stride_n + column, mask=mask, other=0.0
        ).to(tl.float32)
        s = tl.load(s_ptr + sample * s_stride_b + token * s_stride_n + column, mask=mask, other=0.0).to(tl.float32)
        h = tl.where(mask, (s - mean) * rstd, 0.0)
        g = grad_y * scale_plus_one
        g_mean = 0.0 if RMS else tl.div_rn(tl.sum(g, axis=0), width)
        gh_mean = tl.div_rn(tl.sum(g * h, axis=0), width)
        grad = rstd * (g - g_mean - h * gh_mean)
        if HAS_GRAD_S:
            grad += tl.load(
                grad_s_ptr + sample * grad_s_stride_b + token * grad_s_stride_n + column, mask=mask, other=0.0
            ).to(tl.float32)
        tl.store(grad_x_ptr + row * num_columns + column, grad, mask=mask)
        shift_sum += grad_y
        scale_sum += grad_y * h
        if HAS_BRANCH:
            branch = tl.load(
                branch_ptr + sample * branch_stride_b + token * branch_stride_n + column, mask=mask, other=0.0
            ).to(tl.float32)
            tl.store(grad_branch_ptr + row * num_columns + column, grad * gate, mask=mask)
            gate_sum += grad * branch
    partials = partials_ptr + program * 3 * num_columns + column
    tl.store(partials, shift_sum, mask=mask)
    tl.store(partials + num_columns, scale_sum, mask=mask)
    if HAS_BRANCH:
        tl.store(partials + 2 * num_columns, gate_sum, mask=mask)


@triton.jit
def _sum_chunks_kernel(
    partials_ptr, grad_shift_ptr, grad_scale_ptr, grad_gate_ptr, num_columns, num_chunks,
    HAS_BRANCH: tl.constexpr, NUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * NUM_COLUMNS + tl.arange(0, NUM_COLUMNS)
    mask = column < num_columns
    partials = partials_ptr + sample * num_chunks * 3 * num_columns + column
    shift_sum = tl.zeros([NUM_COLUMNS], tl.float32)
    scale_sum = tl.zeros([NUM_COLUMNS], tl.float32)
    gate_sum = tl.zeros([NUM_COLUMNS], tl.float32)
    for _ in range(num_chunks):
        shift_sum += tl.load(partials, mask=mask, other=0.0)
        scale_sum += tl.load(partials + num_columns, mask=mask, other=0.0)
        if HAS_BRANCH:
            gate_sum += tl.load(partials + 2 * num_columns, mask=mask, other=0.0)
        partials += 3 * num_columns
    offset = sample * num_columns + column
    tl.store(grad_shift_ptr + offset, shift_sum, mask=mask)
    tl.store(grad_scale_ptr + offset, scale_sum, mask=mask)
    if HAS_BRANCH:
        tl.store(grad_gate_ptr + offset, gate_sum, mask=mask)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` with unit stride along D, copied only if it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launcher(kernel):
    return kernel if interpreting_triton() else wrap_triton(kernel)


def _num_warps(width: int) -> int:
    """At least 8 columns a thread, the 16 bytes of a bfloat16 access, and at most 8 warps."""
    return max(1, min(8, width // 256))


@_define_op("sendvae_triton::adaln", mutates_args=())
def adaln(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s or [0] without a branch, stats float32 [B, N, 2] = (mean, rstd)); arguments as for the public `adaln`."""
    batch, num_tokens, num_columns = x.shape
    has_branch = branch is not None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = torch.empty_like(y) if has_branch else x.new_empty(0)
    stats = x.new_empty((batch, num_tokens, 2), dtype=torch.float32)
    if batch * num_tokens == 0:
        return y, s, stats
    # Without a branch the kernel does not read one: x and scale take the places of branch and gate.
    tokens = [_unit_stride(t) for t in (x, branch if has_branch else x)]
    rows = [_unit_stride(r) for r in (gate if has_branch else scale, shift, scale)]
    width = triton.next_power_of_2(num_columns)
    with torch.cuda.device_of(x):
        _launcher(_forward_kernel)[(batch * num_tokens,)](
            *tokens, *rows, y, s, stats, num_tokens, num_columns,
            *(stride for t in tokens for stride in t.stride()[:2]), *(r.stride(0) for r in rows), eps,
            HAS_BRANCH=has_branch, RMS=rms, WIDTH=width, num_warps=_num_warps(width),
        )  # fmt: skip
    return y, s, stats


@_define_op("sendvae_triton::adaln_backward", mutates_args=())
def adaln_backward(
    grad_y: torch.Tensor,
    grad_s: torch.Tensor | None,
    s: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    stats: torch.Tensor,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_x, grad_branch, grad_gate, grad_shift, grad_scale); the second and third are [0] without a branch."""
    batch, num_tokens, num_columns = s.shape
    has_branch = branch is not None
    grad_x = torch.empty_like(s, memory_format=torch.contiguous_format)
    grad_branch = torch.empty_like(grad_x) if has_branch else s.new_empty(0)
    grad_gate = scale.new_empty(scale.shape) if has_branch else scale.new_empty(0)
    grad_shift, grad_scale = scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    if batch == 0:
        return grad_x, grad_branch, grad_gate, grad_shift, grad_scale
    # Missing arguments are not read: s and scale take their places.
    tokens = [_unit_stride(t) for t in (grad_y, s if grad_s is None else grad_s, s, branch if has_branch else s)]
    rows = [_unit_stride(r) for r in (gate if has_branch else scale, scale)]
    width = triton.next_power_of_2(num_columns)
    num_chunks = max(1, triton.cdiv(num_tokens, CHUNK))  # without tokens the sums are 0
    partials = s.new_empty((batch, num_chunks, 3, num_columns), dtype=torch.float32)
    with torch.cuda.device_of(s):
        _launcher(_backward_kernel)[(batch * num_chunks,)](
            *tokens, *rows, stats.contiguous(), grad_x, grad_branch, partials, num_tokens, num_columns, num_chunks,
            *(stride for t in tokens for stride in t.stride()[:2]), *(r.stride(0) for r in rows),
            HAS_GRAD_S=grad_s is not None, HAS_BRANCH=has_branch, RMS=rms, CHUNK=CHUNK, WIDTH=width,
            num_warps=_num_warps(width),
        )  # fmt: skip
        _launcher(_sum_chunks_kernel)[(batch, triton.cdiv(num_columns, NUM_COLUMNS))](
            partials, grad_shift, grad_scale, grad_gate, num_columns, num_chunks,
            HAS_BRANCH=has_branch, NUM_COLUMNS=NUM_COLUMNS,
        )  # fmt: skip
    return grad_x, grad_branch, grad_gate, grad_shift, grad_scale
