"""Triton kernels of `lpips_distance`: a launch forward and a small sum, a launch backward for each side that asks.

A program takes NUM_PIXELS pixels of a sample and walks over their channels in steps of NUM_CHANNELS: forward twice, for
the norms and then for the distance, the second time from cache; backward once. Features are read through three strides
(batch, channel, pixel); Triton orders its accesses by the one that is 1.
"""

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from sendvae_fast.ops.dispatch import interpreting_triton
from sendvae_fast.ops.layout import common_memory_format, plane_strides

# VGG's 64 to 512 channels are multiples of 64; the tile is 16 elements of each tensor for every thread of 4 warps.
NUM_PIXELS, NUM_CHANNELS = 32, 64

_define_op = custom_op if interpreting_triton() else triton_op


@triton.jit
def _tile(num_tiles, num_pixels, NUM_PIXELS: tl.constexpr):
    """This program's sample and pixels, and the mask."""
    program = tl.program_id(0)
    sample = program // num_tiles
    pixel = (program - sample * num_tiles).to(tl.int64) * NUM_PIXELS + tl.arange(0, NUM_PIXELS)
    return sample.to(tl.int64), pixel, pixel < num_pixels


@triton.jit
def _load(pixel_ptr, channel, stride_c, mask):
    return tl.load(pixel_ptr[:, None] + channel.to(tl.int64)[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    f0_ptr, f1_ptr, weight_ptr, sums_ptr, stats_ptr,
    num_tiles, num_pixels, num_channels,
    f0_stride_b, f0_stride_c, f0_stride_p, f1_stride_b, f1_stride_c, f1_stride_p,
    NUM_PIXELS: tl.constexpr, NUM_CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, pixel, pixel_mask = _tile(num_tiles, num_pixels, NUM_PIXELS)
    f0_pixel_ptr = f0_ptr + sample * f0_stride_b + pixel * f0_stride_p
    f1_pixel_ptr = f1_ptr + sample * f1_stride_b + pixel * f1_stride_p
    square0 = tl.zeros([NUM_PIXELS, NUM_CHANNELS], tl.float32)
    square1 = tl.zeros([NUM_PIXELS, NUM_CHANNELS], tl.float32)
    for start in range(0, num_channels, NUM_CHANNELS):
        channel = start + tl.arange(0, NUM_CHANNELS)
        mask = pixel_mask[:, None] & (channel < num_channels)[None, :]
        f0 = _load(f0_pixel_ptr, channel, f0_stride_c, mask)
        f1 = _load(f1_pixel_ptr, channel, f1_stride_c, mask)
        square0 += f0 * f0
        square1 += f1 * f1
    norm0 = tl.sqrt_rn(tl.sum(square0, axis=1))
    norm1 = tl.sqrt_rn(tl.sum(square1, axis=1))
    floored0, floored1 = norm0[:, None] + 1e-10, norm1[:, None] + 1e-10
    distance = tl.zeros([NUM_PIXELS, NUM_CHANNELS], tl.float32)
    dot0 = tl.zeros([NUM_PIXELS, NUM_CHANNELS], tl.float32)
    dot1 = tl.zeros([NUM_PIXELS, NUM_CHANNELS], tl.float32)
    for start in range(0, num_channels, NUM_CHANNELS):
        channel = start + tl.arange(0, NUM_CHANNELS)
        channel_mask = channel < num_channels
        mask = pixel_mask[:, None] & channel_mask[None, :]
        weight = tl.load(weight_ptr + channel, mask=channel_mask, other=0.0)[None, :]
        # Not times a reciprocal: its rounding would dominate where the units are alike or the gradient cancels.
        unit0 = tl.div_rn(_load(f0_pixel_ptr, channel, f0_stride_c, mask), floored0)
        unit1 = tl.div_rn(_load(f1_pixel_ptr, channel, f1_stride_c, mask), floored1)
        difference = unit0 - unit1
        weighted = weight * difference
        distance += weighted * difference
        dot0 += weighted * unit0
        dot1 -= weighted * unit1
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(distance, axis=1), axis=0))
    stats_pixel_ptr = stats_ptr + sample * 4 * num_pixels + pixel
    tl.store(stats_pixel_ptr, norm0, mask=pixel_mask)
    tl.store(stats_pixel_ptr + num_pixels, norm1, mask=pixel_mask)
    tl.store(stats_pixel_ptr + 2 * tl.cast(num_pixels, tl.int64), tl.sum(dot0, axis=1), mask=pixel_mask)
    tl.store(stats_pixel_ptr + 3 * tl.cast(num_pixels, tl.int64), tl.sum(dot1, axis=1), mask=pixel_mask)


@triton.jit
def _backward_kernel(
    grad_ptr, own_ptr, other_ptr, weight_ptr, stats_ptr, grad_own_ptr,
    num_tiles, num_pixels, num_channels, grad_stride,
    own_stride_b, own_stride_c, own_stride_p, other_stride_b, other_stride_c, other_stride_p,
    grad_own_stride_b, grad_own_stride_c, grad_own_stride_p,
    SIDE: tl.constexpr, NUM_PIXELS: tl.constexpr, NUM_CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, pixel, pixel_mask = _tile(num_tiles, num_pixels, NUM_PIXELS)
    stats_pixel_ptr = stats_ptr + sample * 4 * num_pixels + pixel
    own_norm = tl.load(stats_pixel_ptr + SIDE * num_pixels, mask=pixel_mask, other=1.0)
    other_norm = tl.load(stats_pixel_ptr + (1 - SIDE) * num_pixels, mask=pixel_mask, other=1.0)
    dot = tl.load(stats_pixel_ptr + (2 + SIDE) * tl.cast(num_pixels, tl.int64), mask=pixel_mask, other=0.0)
    own_floored, other_floored = own_norm + 1e-10, other_norm + 1e-10
    # A norm of 0 counts as a constant, and this term is gone.
    along = tl.where(own_norm == 0.0, 0.0, dot * tl.div_rn(own_floored, own_norm))
    grad = tl.load(grad_ptr + sample * grad_stride) * 2.0
    scale = tl.div_rn(tl.div_rn(grad, tl.cast(num_pixels, tl.float32)), own_floored)
    own_pixel_ptr = own_ptr + sample * own_stride_b + pixel * own_stride_p
    other_pixel_ptr = other_ptr + sample * other_stride_b + pixel * other_stride_p
    grad_own_pixel_ptr = grad_own_ptr + sample * grad_own_stride_b + pixel * grad_own_stride_p
    for start in range(0, num_channels, NUM_CHANNELS):
        channel = start + tl.arange(0, NUM_CHANNELS)
        channel_mask = channel < num_channels
        mask = pixel_mask[:, None] & channel_mask[None, :]
        weight = tl.load(weight_ptr + channel, mask=channel_mask, other=0.0)[None, :]
        own_unit = tl.div_rn(_load(own_pixel_ptr, channel, own_stride_c, mask), own_floored[:, None])
        other_unit = tl.div_rn(_load(other_pixel_ptr, channel, other_stride_c, mask), other_floored[:, None])
        value = scale[:, None] * (weight * (own_unit - other_unit) - along[:, None] * own_unit)
        offset = channel.to(tl.int64)[None, :] * grad_own_stride_c
        tl.store(grad_own_pixel_ptr[:, None] + offset, value, mask=mask)


@_define_op("sendvae_triton::lpips_distance", mutates_args=())
def lpips_distance(f0: torch.Tensor, f1: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(distance [B], stats [B, 4, H W] = (|f0|, |f1|, <w (u0 - u1), u0>, <w (u1 - u0), u1>)), float32."""
    batch, num_channels, height, width = f0.shape
    num_pixels = height * width
    num_tiles = triton.cdiv(num_pixels, NUM_PIXELS)
    sums = weight.new_empty(batch, num_tiles)
    stats = weight.new_empty(batch, 4, num_pixels)
    if batch > 0:
        f0, f0_strides = plane_strides(f0)
        f1, f1_strides = plane_strides(f1)
        kernel = _forward_kernel if interpreting_triton() else wrap_triton(_forward_kernel)
        with torch.cuda.device_of(f0):
            kernel[(batch * num_tiles,)](
                f0, f1, weight.contiguous(), sums, stats,
                num_tiles, num_pixels, num_channels, *f0_strides, *f1_strides,
                NUM_PIXELS=NUM_PIXELS, NUM_CHANNELS=NUM_CHANNELS,
            )  # fmt: skip
    return sums.sum(1) / num_pixels, stats


@_define_op("sendvae_triton::lpips_distance_backward", mutates_args=())
def lpips_distance_backward(
    grad: torch.Tensor,
    f0: torch.Tensor,
    f1: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    need_grad0: bool,
    need_grad1: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad0, grad1), like f0, or [0] where it is not needed; grad is float32 [B]."""
    memory_format = common_memory_format(f0, f1)
    grads = tuple(
        torch.empty_like(f0, memory_format=memory_format) if needed else f0.new_empty(0)
        for needed in (need_grad0, need_grad1)
    )
    batch, num_channels, height, width = f0.shape
    num_pixels = height * width
    num_tiles = triton.cdiv(num_pixels, NUM_PIXELS)
    sides = [plane_strides(f) for f in (f0, f1)]
    kernel = _backward_kernel if interpreting_triton() else wrap_triton(_backward_kernel)
    for side, needed in enumerate((need_grad0, need_grad1)):
        if batch == 0 or not needed:
            continue
        (own, own_strides), (other, other_strides) = sides[side], sides[1 - side]
        with torch.cuda.device_of(f0):
            kernel[(batch * num_tiles,)](
                grad, own, other, weight.contiguous(), stats.contiguous(), grads[side],
                num_tiles, num_pixels, num_channels, grad.stride(0),
                *own_strides, *other_strides, *plane_strides(grads[side])[1],
                SIDE=side, NUM_PIXELS=NUM_PIXELS, NUM_CHANNELS=NUM_CHANNELS,
            )  # fmt: skip
    return grads
