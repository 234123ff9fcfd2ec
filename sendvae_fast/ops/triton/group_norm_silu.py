"""Triton kernels of `group_norm_silu`: three launches forward, three and a sum backward.

A program takes a tile of one sample, NUM_PIXELS pixels by NUM_CHANNELS channels, which fits into its registers. The
first pass leaves two numbers for each channel of each chunk of pixels (its moments; backward, its parts of the bias's
and the weight's gradients), a small second one joins them for each sample and group, the third writes the outputs. Maps
are channels-last; everything is float32. Every sum has a fixed order.

Shape letters: B batch, P pixels (H W), C channels, G groups.
"""

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from sendvae_fast.ops.dispatch import interpreting_triton

TILE_ELEMENTS = 8192  # 32 a thread on the 8 warps of a program
MAX_CHANNELS = 64
JOIN_ELEMENTS = 1024

_define_op = custom_op if interpreting_triton() else triton_op


@triton.jit
def _tile(num_chunks, num_pixels, num_channels, NUM_PIXELS: tl.constexpr, NUM_CHANNELS: tl.constexpr):
    """This program's sample and chunk, its channels, the offsets of its elements in a map, and the two masks."""
    sample = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) - sample * num_chunks
    channel = tl.program_id(1) * NUM_CHANNELS + tl.arange(0, NUM_CHANNELS)
    pixel = chunk.to(tl.int64) * NUM_PIXELS + tl.arange(0, NUM_PIXELS)
    offset = (sample.to(tl.int64) * num_pixels + pixel[:, None]) * num_channels + channel[None, :]
    channel_mask = channel < num_channels
    mask = (pixel < num_pixels)[:, None] & channel_mask[None, :]
    return sample.to(tl.int64), chunk, channel, offset, channel_mask, mask


@triton.jit
def _normalisation(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, mask, num_channels, num_groups
):  # fmt: skip
    """For each channel: its group's index in [B, G], mean, rstd times weight, bias."""
    group = sample * num_groups + channel // (num_channels // num_groups)
    mean = tl.load(mean_ptr + group, mask=mask, other=0.0)
    scale = tl.load(rstd_ptr + group, mask=mask, other=0.0) * tl.load(weight_ptr + channel, mask=mask, other=0.0)
    return group, mean, scale, tl.load(bias_ptr + channel, mask=mask, other=0.0)


@triton.jit
def _sigmoid(z):
    # From -80 on it is 0 to float32; e^80 is still finite. Comparisons pass NaN on.
    return tl.div_rn(1.0, 1.0 + tl.exp(-tl.where(z < -80.0, -80.0, z)))


@triton.jit
def _pre_activation_grad(grad_y, z, SILU: tl.constexpr):
    """The gradient of z from that of y."""
    if SILU:
        # 1 - sigmoid(z) without the cancellation.
        grad_z = grad_y * (_sigmoid(z) * (1.0 + z * _sigmoid(-z)))
    else:
        grad_z = grad_y
    return grad_z


@triton.jit
def _store_parts(ptr, sample, chunk, num_chunks, num_channels, channel, mask, first, second):
    """Two numbers for each channel of a chunk, to [B, chunks, 2, C]."""
    offset = (sample * num_chunks + chunk) * 2 * num_channels + channel
    tl.store(ptr + offset, first, mask=mask)
    tl.store(ptr + offset + num_channels, second, mask=mask)


@triton.jit
def _moments_kernel(
    x_ptr, residual_ptr, s_ptr, moments_ptr, num_chunks, num_pixels, num_channels,
    HAS_RESIDUAL: tl.constexpr, NUM_PIXELS: tl.constexpr, NUM_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The channels' means in each chunk and their sums of squares around them; forms s."""
    sample, chunk, channel, offset, channel_mask, mask = _tile(
        num_chunks, num_pixels, num_channels, NUM_PIXELS, NUM_CHANNELS
    )
    x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offset, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(s_ptr + offset, x, mask=mask)
    x = x.to(tl.float32)
    count = tl.minimum(num_pixels - chunk * NUM_PIXELS, NUM_PIXELS).to(tl.float32)
    centre = tl.div_rn(tl.sum(x, axis=0), count)
    distance = tl.where(mask, x - centre[None, :], 0.0)
    # The rounding error of the centre: with a large mean it exceeds that of the distances.
    error = tl.sum(distance, axis=0)
    mean = centre + tl.div_rn(error, count)
    squares = tl.sum(distance * distance, axis=0) - tl.div_rn(error * error, count)
    _store_parts(moments_ptr, sample, chunk, num_chunks, num_channels, channel, channel_mask, mean, squares)


@triton.jit
def _join_moments_kernel(
    moments_ptr, mean_ptr, rstd_ptr, num_chunks, num_pixels, num_channels, num_groups, eps,
    NUM_PIXELS: tl.constexpr, NUM_ELEMENTS: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one sample and group from the moments of its channels in all chunks."""
    eps = tl.cast(eps, tl.float32)  # Inductor may pass a float64 scalar
    program = tl.program_id(0)
    sample = program // num_groups
    group = program - sample * num_groups
    width = num_channels // num_groups
    first = moments_ptr + sample.to(tl.int64) * num_chunks * 2 * num_channels + group * width
    count = tl.cast(num_pixels, tl.float32) * width
    # Sums of distances from a value near the mean lose nothing to a large mean.
    base = tl.load(first)
    total = tl.zeros([NUM_ELEMENTS], tl.float32)
    for start in range(0, num_chunks * width, NUM_ELEMENTS):
        index = start + tl.arange(0, NUM_ELEMENTS)
        mask = index < num_chunks * width
        chunk = index // width
        pixels = tl.minimum(num_pixels - chunk * NUM_PIXELS, NUM_PIXELS).to(tl.float32)
        offset = chunk.to(tl.int64) * 2 * num_channels + index - chunk * width
        total += tl.where(mask, pixels * (tl.load(first + offset, mask=mask, other=0.0) - base), 0.0)
    mean = base + tl.div_rn(tl.sum(total, axis=0), count)
    total = tl.zeros([NUM_ELEMENTS], tl.float32)
    for start in range(0, num_chunks * width, NUM_ELEMENTS):
        index = start + tl.arange(0, NUM_ELEMENTS)
        mask = index < num_chunks * width
        chunk = index // width
        pixels = tl.minimum(num_pixels - chunk * NUM_PIXELS, NUM_PIXELS).to(tl.float32)
        offset = chunk.to(tl.int64) * 2 * num_channels + index - chunk * width
        distance = tl.load(first + offset, mask=mask, other=0.0) - mean
        squares = tl.load(first + offset + num_channels, mask=mask, other=0.0)
        total += tl.where(mask, squares + pixels * distance * distance, 0.0)
    variance = tl.div_rn(tl.sum(total, axis=0), count)
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@triton.jit
def _output_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr, num_chunks, num_pixels, num_channels, num_groups,
    SILU: tl.constexpr, NUM_PIXELS: tl.constexpr, NUM_CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, _, channel, offset, channel_mask, mask = _tile(
        num_chunks, num_pixels, num_channels, NUM_PIXELS, NUM_CHANNELS
    )
    _, mean, scale, bias = _normalisation(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, channel_mask, num_channels, num_groups
    )
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    tl.store(y_ptr + offset, z * _sigmoid(z) if SILU else z, mask=mask)


@triton.jit
def _parameter_grads_kernel(
    grad_y_ptr, s_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, parts_ptr,
    num_chunks, num_pixels, num_channels, num_groups,
    SILU: tl.constexpr, NUM_PIXELS: tl.constexpr, NUM_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each chunk's part of the gradients of bias and of weight / rstd."""
    sample, chunk, channel, offset, channel_mask, mask = _tile(
        num_chunks, num_pixels, num_channels, NUM_PIXELS, NUM_CHANNELS
    )
    _, mean, scale, bias = _normalisation(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, channel_mask, num_channels, num_groups
    )
    distance = tl.load(s_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    grad_y = tl.load(grad_y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad_z = _pre_activation_grad(grad_y, distance * scale[None, :] + bias[None, :], SILU)
    grad_z = tl.where(mask, grad_z, 0.0)
    bias_part, weight_part = tl.sum(grad_z, axis=0), tl.sum(grad_z * distance, axis=0)
    _store_parts(parts_ptr, sample, chunk, num_chunks, num_channels, channel, channel_mask, bias_part, weight_part)


@triton.jit
def _join_parameter_grads_kernel(
    parts_ptr, weight_ptr, rstd_ptr, sums_ptr, group_grads_ptr, num_chunks, num_pixels, num_channels, num_groups,
    NUM_CHUNKS: tl.constexpr, NUM_CHANNELS: tl.constexpr,
):  # fmt: skip
    """For a sample and group: the sums [2, C / G] of the parts, and the two numbers all its input gradients share."""
    program = tl.program_id(0)
    sample = (program // num_groups).to(tl.int64)
    group = program - (program // num_groups) * num_groups
    width = num_channels // num_groups
    rstd = tl.load(rstd_ptr + program)
    total = tl.zeros([NUM_CHANNELS], tl.float32)
    total_xhat = tl.zeros([NUM_CHANNELS], tl.float32)
    for begin in range(0, width, NUM_CHANNELS):
        column = begin + tl.arange(0, NUM_CHANNELS)
        channel = group * width + column
        bias_sum = tl.zeros([NUM_CHUNKS, NUM_CHANNELS], tl.float32)
        weight_sum = tl.zeros([NUM_CHUNKS, NUM_CHANNELS], tl.float32)
        for start in range(0, num_chunks, NUM_CHUNKS):
            chunk = start + tl.arange(0, NUM_CHUNKS)
            mask = (chunk < num_chunks)[:, None] & (column < width)[None, :]
            offset = (sample * num_chunks + chunk[:, None]) * 2 * num_channels + channel[None, :]
            bias_sum += tl.load(parts_ptr + offset, mask=mask, other=0.0)
            weight_sum += tl.load(parts_ptr + offset + num_channels, mask=mask, other=0.0)
        bias_grad, weight_grad = tl.sum(bias_sum, axis=0), tl.sum(weight_sum, axis=0) * rstd
        tl.store(sums_ptr + sample * 2 * num_channels + channel, bias_grad, mask=column < width)
        tl.store(sums_ptr + (sample * 2 + 1) * num_channels + channel, weight_grad, mask=column < width)
        weight = tl.load(weight_ptr + channel, mask=column < width, other=0.0)
        total += weight * bias_grad
        total_xhat += weight * weight_grad
    count = tl.cast(num_pixels, tl.float32) * width
    tl.store(group_grads_ptr + program * 2, rstd * tl.div_rn(tl.sum(total, axis=0), count))
    tl.store(group_grads_ptr + program * 2 + 1, rstd * rstd * tl.div_rn(tl.sum(total_xhat, axis=0), count))


@triton.jit
def _input_grad_kernel(
    grad_y_ptr, grad_s_ptr, s_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group_grads_ptr, grad_x_ptr,
    num_chunks, num_pixels, num_channels, num_groups,
    HAS_GRAD_S: tl.constexpr, SILU: tl.constexpr, NUM_PIXELS: tl.constexpr, NUM_CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, _, channel, offset, channel_mask, mask = _tile(
        num_chunks, num_pixels, num_channels, NUM_PIXELS, NUM_CHANNELS
    )
    group, mean, scale, bias = _normalisation(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, channel_mask, num_channels, num_groups
    )
    constant = tl.load(group_grads_ptr + group * 2, mask=channel_mask, other=0.0)
    slope = tl.load(group_grads_ptr + group * 2 + 1, mask=channel_mask, other=0.0)
    distance = tl.load(s_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    grad_y = tl.load(grad_y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad_z = _pre_activation_grad(grad_y, distance * scale[None, :] + bias[None, :], SILU)
    grad = scale[None, :] * grad_z - constant[None, :] - distance * slope[None, :]
    if HAS_GRAD_S:
        grad += tl.load(grad_s_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + offset, grad, mask=mask)


def _launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    (kernel if interpreting_triton() else wrap_triton(kernel))[grid](*arguments, **constants)


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """(B, P, C) of [B, C, H, W]; C, on which the tiles depend, is a constant under torch.compile."""
    return x.shape[0], x.shape[2] * x.shape[3], int(x.shape[1])


def _tiling(num_pixels: int, num_channels: int) -> tuple[dict[str, int], int, int]:
    """A tile's sizes, and how many of them are after each other and side by side in a sample."""
    tile_channels = min(triton.next_power_of_2(num_channels), MAX_CHANNELS)
    tile_pixels = TILE_ELEMENTS // tile_channels
    constants = dict(NUM_PIXELS=tile_pixels, NUM_CHANNELS=tile_channels)
    return constants, triton.cdiv(num_pixels, tile_pixels), triton.cdiv(num_channels, tile_channels)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@_define_op("sendvae_triton::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, stats [2, B, G]: means, then rstds); s is empty [0] without a residual. Arguments are checked already."""
    batch, num_pixels, num_channels = _sizes(x)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    s = x.new_empty(0) if residual is None else torch.empty_like(y)
    stats = x.new_empty((2, batch, num_groups), dtype=torch.float32)
    if batch == 0:
        return y, s, stats
    mean, rstd = stats.unbind()
    x = _channels_last(x)
    summand = x if residual is None else _channels_last(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    tile, num_chunks, num_columns = _tiling(num_pixels, num_channels)
    moments = x.new_empty((batch, num_chunks, 2, num_channels), dtype=torch.float32)
    grid = (batch * num_chunks, num_columns)
    with torch.cuda.device_of(x):
        _launch(
            _moments_kernel, grid, x, summand, s, moments, num_chunks, num_pixels, num_channels,
            HAS_RESIDUAL=residual is not None, **tile, num_warps=8,
        )  # fmt: skip
        _launch(
            _join_moments_kernel, (batch * num_groups,), moments, mean, rstd,
            num_chunks, num_pixels, num_channels, num_groups, eps,
            NUM_PIXELS=tile["NUM_PIXELS"], NUM_ELEMENTS=JOIN_ELEMENTS,
        )  # fmt: skip
        _launch(
            _output_kernel, grid, x if residual is None else s, weight, bias, mean, rstd, y,
            num_chunks, num_pixels, num_channels, num_groups, SILU=silu, **tile, num_warps=8,
        )  # fmt: skip
    return y, s, stats


@_define_op("sendvae_triton::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward(
    grad_y: torch.Tensor,
    grad_s: torch.Tensor | None,
    s: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_x, grad_weight [C], grad_bias [C])."""
    batch, num_pixels, num_channels = _sizes(s)
    grad_x = torch.empty_like(s, memory_format=torch.channels_last)
    if batch == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    s, grad_y = _channels_last(s), _channels_last(grad_y)
    other = grad_y if grad_s is None else _channels_last(grad_s)
    stats, weight, bias = (tensor.contiguous() for tensor in (stats, weight, bias))
    mean, rstd = stats.unbind()
    tile, num_chunks, num_columns = _tiling(num_pixels, num_channels)
    parts = s.new_empty((batch, num_chunks, 2, num_channels), dtype=torch.float32)
    sums = s.new_empty((batch, 2, num_channels), dtype=torch.float32)
    group_grads = s.new_empty((batch, num_groups, 2), dtype=torch.float32)
    grid = (batch * num_chunks, num_columns)
    join_channels = min(triton.next_power_of_2(num_channels // num_groups), 32)
    with torch.cuda.device_of(s):
        _launch(
            _parameter_grads_kernel, grid, grad_y, s, weight, bias, mean, rstd, parts,
            num_chunks, num_pixels, num_channels, num_groups, SILU=silu, **tile, num_warps=8,
        )  # fmt: skip
        _launch(
            _join_parameter_grads_kernel, (batch * num_groups,), parts, weight, rstd, sums, group_grads,
            num_chunks, num_pixels, num_channels, num_groups,
            NUM_CHUNKS=JOIN_ELEMENTS // join_channels, NUM_CHANNELS=join_channels,
        )  # fmt: skip
        _launch(
            _input_grad_kernel, grid, grad_y, other, s, weight, bias, mean, rstd, group_grads, grad_x,
            num_chunks, num_pixels, num_channels, num_groups,
            HAS_GRAD_S=grad_s is not None, SILU=silu, **tile, num_warps=8,
        )  # fmt: skip
    grad_bias, grad_weight = sums.sum(0).unbind()
    return grad_x, grad_weight.clone(), grad_bias.clone()
