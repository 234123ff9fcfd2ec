"""Triton kernels of `noise_inject`: one launch forward, one backward.

A program takes one tile of one sample: NUM_BLOCKS Philox blocks, that is 4 NUM_BLOCKS consecutive elements in the
sample's [C, H, W] order. Noise lives in registers only. Inputs are read through three strides (batch, channel, position
in the plane), so chunks of the moments, channels-last tensors and expanded gradients are read in place; outputs are
contiguous. With a patch size, z_t is written and its gradient read as tokens [B, N, C P P].
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from sendvae_fast.ops.dispatch import interpreting_triton
from sendvae_fast.ops.layout import plane_strides
from sendvae_fast.ops.philox import Stream
from sendvae_fast.ops.triton.philox import block_words, derive_key, normals, to_uniform

# 1024 elements on Triton's 4 warps: 16-byte accesses in float32, and enough programs to fill a GPU from 32 samples of
# 32x16x16.
NUM_BLOCKS = 256

_POSTERIOR = tl.constexpr(int(Stream.POSTERIOR))
_INTERPOLANT = tl.constexpr(int(Stream.INTERPOLANT))
_TIME = tl.constexpr(int(Stream.TIME))

# The interpreter's kernels are opaque to tracing; a custom_op still works under torch.compile.
_define_op = custom_op if interpreting_triton() else triton_op


@triton.jit
def _exp(x):
    """e^x in float32 to about 2 units in the last place.

    tl.exp rounds x log2(e) once, which costs |x| / 2 more; here the rest of the product is carried along.
    """
    high = x * 1.4426950216293335
    low = tl.fma(x, 1.4426950216293335, -high) + x * 1.925963033500117e-08
    return tl.exp2(high) * (1.0 + 0.6931471805599453 * low)


@triton.jit
def _standard_deviation(spread, SPREAD_IS_STD: tl.constexpr):
    if SPREAD_IS_STD:
        std = spread
    else:
        # Comparisons, not minimum and maximum: they pass NaN on.
        std = _exp(0.5 * tl.where(spread < -30.0, -30.0, tl.where(spread > 20.0, 20.0, spread)))
    return std


@triton.jit
def _tile(num_tiles, num_elements, plane, NUM_BLOCKS: tl.constexpr):
    """This program's sample and tile, Philox blocks, elements, their channels and positions in the plane, the mask."""
    program = tl.program_id(0)
    sample = program // num_tiles
    tile = program - sample * num_tiles
    first_block = tile.to(tl.uint32) * NUM_BLOCKS
    block = first_block + tl.arange(0, NUM_BLOCKS).to(tl.uint32)
    # Unsigned, since the last tile may end beyond 2^31.
    element = first_block * 4 + tl.arange(0, 4 * NUM_BLOCKS).to(tl.uint32)
    channel = element // tl.cast(plane, tl.uint32)
    position = element - channel * tl.cast(plane, tl.uint32)
    mask = element < tl.cast(num_elements, tl.uint32)
    return sample.to(tl.int64), tile, block, element, channel.to(tl.int64), position.to(tl.int64), mask


@triton.jit
def _load(ptr, sample, channel, position, stride_b, stride_c, stride_p, mask):
    offset = sample * stride_b + channel * stride_c + position * stride_p
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _token_place(channel, position, width, PATCH: tl.constexpr):
    """The token of an element of a sample, and which of its features it is; all int64."""
    row, column = position // width, position % width
    token = row // PATCH * (width // PATCH) + column // PATCH
    return token, (channel * PATCH + row % PATCH) * PATCH + column % PATCH


@triton.jit
def _forward_kernel(
    mean_ptr, spread_ptr, latent_mean_ptr, latent_std_ptr, key_ptr, sample_ids_ptr, given_t_ptr,
    z_ptr, z_t_ptr, velocity_ptr, t_ptr,
    num_tiles, num_elements, plane, width, num_features,
    mean_stride_b, mean_stride_c, mean_stride_p, spread_stride_b, spread_stride_c, spread_stride_p,
    HAS_T: tl.constexpr, SPREAD_IS_STD: tl.constexpr, PATCH: tl.constexpr, NEED_Z: tl.constexpr,
    NEED_VELOCITY: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    sample, tile, block, element, channel, position, mask = _tile(num_tiles, num_elements, plane, NUM_BLOCKS)
    key_0, key_1 = derive_key(key_ptr)
    sample_id = tl.load(sample_ids_ptr + sample)
    row = sample + tl.zeros([1], tl.int64)
    if HAS_T:
        t = tl.load(given_t_ptr + row)
    else:
        word, _, _, _ = block_words(key_0, key_1, _TIME, sample_id, tl.zeros([1], tl.uint32))
        t = to_uniform(word)
    if tile == 0:
        tl.store(t_ptr + row, t)

    mean = _load(mean_ptr, sample, channel, position, mean_stride_b, mean_stride_c, mean_stride_p, mask)
    spread = _load(spread_ptr, sample, channel, position, spread_stride_b, spread_stride_c, spread_stride_p, mask)
    latent_mean = tl.load(latent_mean_ptr + channel, mask=mask, other=0.0)
    latent_std = tl.load(latent_std_ptr + channel, mask=mask, other=1.0)

    z = mean + _standard_deviation(spread, SPREAD_IS_STD) * normals(key_0, key_1, _POSTERIOR, sample_id, block)
    normalised = tl.div_rn(z - latent_mean, latent_std)
    noise = normals(key_0, key_1, _INTERPOLANT, sample_id, block)
    offset = sample * num_elements + element.to(tl.int64)
    if NEED_Z:
        tl.store(z_ptr + offset, z, mask=mask)
    if NEED_VELOCITY:
        tl.store(velocity_ptr + offset, noise - normalised, mask=mask)
    if PATCH > 0:
        token, feature = _token_place(channel, position, width, PATCH)
        offset = sample * num_elements + token * num_features + feature
    tl.store(z_t_ptr + offset, (1.0 - t) * normalised + t * noise, mask=mask)


@triton.jit
def _backward_kernel(
    grad_z_ptr, grad_z_t_ptr, grad_velocity_ptr, spread_ptr, latent_std_ptr, key_ptr, sample_ids_ptr, t_ptr,
    grad_mean_ptr, grad_spread_ptr,
    num_tiles, num_elements, plane, width,
    grad_z_stride_b, grad_z_stride_c, grad_z_stride_p,
    grad_z_t_stride_b, grad_z_t_stride_c, grad_z_t_stride_p,
    grad_velocity_stride_b, grad_velocity_stride_c, grad_velocity_stride_p,
    spread_stride_b, spread_stride_c, spread_stride_p,
    SPREAD_IS_STD: tl.constexpr, PATCH: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    sample, _, block, element, channel, position, mask = _tile(num_tiles, num_elements, plane, NUM_BLOCKS)
    key_0, key_1 = derive_key(key_ptr)
    sample_id = tl.load(sample_ids_ptr + sample)
    t = tl.load(t_ptr + sample)

    grad_z = _load(grad_z_ptr, sample, channel, position, grad_z_stride_b, grad_z_stride_c, grad_z_stride_p, mask)
    if PATCH > 0:
        # Strides of tokens [B, N, C P P] instead: the middle one goes with the token, the last with the feature.
        grad_z_t_at, grad_z_t_in = _token_place(channel, position, width, PATCH)
    else:
        grad_z_t_at, grad_z_t_in = channel, position
    grad_z_t = _load(
        grad_z_t_ptr, sample, grad_z_t_at, grad_z_t_in, grad_z_t_stride_b, grad_z_t_stride_c, grad_z_t_stride_p, mask
    )
    grad_velocity = _load(
        grad_velocity_ptr, sample, channel, position,
        grad_velocity_stride_b, grad_velocity_stride_c, grad_velocity_stride_p, mask,
    )  # fmt: skip
    spread = _load(spread_ptr, sample, channel, position, spread_stride_b, spread_stride_c, spread_stride_p, mask)
    latent_std = tl.load(latent_std_ptr + channel, mask=mask, other=1.0)

    grad = grad_z + tl.div_rn((1.0 - t) * grad_z_t - grad_velocity, latent_std)
    grad_spread = grad * normals(key_0, key_1, _POSTERIOR, sample_id, block)
    if not SPREAD_IS_STD:
        inside = (spread >= -30.0) & (spread <= 20.0)
        grad_spread = tl.where(inside, grad_spread * (0.5 * _standard_deviation(spread, SPREAD_IS_STD)), 0.0)
    offset = sample * num_elements + element.to(tl.int64)
    tl.store(grad_mean_ptr + offset, grad, mask=mask)
    tl.store(grad_spread_ptr + offset, grad_spread, mask=mask)


@_define_op("sendvae_triton::noise_inject", mutates_args=())
def noise_inject(
    mean: torch.Tensor,
    spread: torch.Tensor,
    latent_mean: torch.Tensor,
    latent_std: torch.Tensor,
    key: torch.Tensor,
    sample_ids: torch.Tensor,
    t: torch.Tensor | None,
    spread_is_std: bool,
    patch_size: int | None,
    need_z: bool,
    need_velocity: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, z_t, velocity, t); arguments as for the public `noise_inject`, already checked."""
    num_elements, plane = math.prod(mean.shape[1:]), math.prod(mean.shape[2:])
    z, z_t, velocity = (
        torch.empty_like(mean, memory_format=torch.contiguous_format) if needed else mean.new_empty(0)
        for needed in (need_z, True, need_velocity)
    )
    num_features = 0
    if patch_size is not None:
        area = patch_size * patch_size
        num_features = mean.shape[1] * area
        z_t = mean.new_empty(mean.shape[0], plane // area, num_features)
    t_out = latent_mean.new_empty(mean.shape[0])
    if mean.shape[0] == 0:
        return z, z_t, velocity, t_out
    num_tiles = triton.cdiv(num_elements, 4 * NUM_BLOCKS)
    mean, mean_strides = plane_strides(mean)
    spread, spread_strides = plane_strides(spread)
    kernel = _forward_kernel if interpreting_triton() else wrap_triton(_forward_kernel)
    with torch.cuda.device_of(mean):
        kernel[(mean.shape[0] * num_tiles,)](
            mean, spread, latent_mean.contiguous(), latent_std.contiguous(), key.contiguous(), sample_ids.contiguous(),
            latent_mean if t is None else t.contiguous(),  # not read without HAS_T
            z, z_t, velocity, t_out,
            num_tiles, num_elements, plane, mean.shape[3], num_features, *mean_strides, *spread_strides,
            HAS_T=t is not None, SPREAD_IS_STD=spread_is_std, PATCH=patch_size or 0, NEED_Z=need_z,
            NEED_VELOCITY=need_velocity, NUM_BLOCKS=NUM_BLOCKS,
        )  # fmt: skip
    return z, z_t, velocity, t_out


@_define_op("sendvae_triton::noise_inject_backward", mutates_args=())
def noise_inject_backward(
    grad_z: torch.Tensor,
    grad_z_t: torch.Tensor,
    grad_velocity: torch.Tensor,
    spread: torch.Tensor,
    latent_std: torch.Tensor,
    key: torch.Tensor,
    sample_ids: torch.Tensor,
    t: torch.Tensor,
    spread_is_std: bool,
    patch_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_mean, grad_spread); `t` is the forward's output."""
    grad_mean, grad_spread = (torch.empty_like(spread, memory_format=torch.contiguous_format) for _ in range(2))
    if spread.shape[0] == 0:
        return grad_mean, grad_spread
    num_elements, plane = math.prod(spread.shape[1:]), math.prod(spread.shape[2:])
    num_tiles = triton.cdiv(num_elements, 4 * NUM_BLOCKS)
    grad_z, grad_z_strides = plane_strides(grad_z)
    grad_z_t, grad_z_t_strides = plane_strides(grad_z_t) if patch_size is None else (grad_z_t, grad_z_t.stride())
    grad_velocity, grad_velocity_strides = plane_strides(grad_velocity)
    spread, spread_strides = plane_strides(spread)
    kernel = _backward_kernel if interpreting_triton() else wrap_triton(_backward_kernel)
    with torch.cuda.device_of(spread):
        kernel[(spread.shape[0] * num_tiles,)](
            grad_z, grad_z_t, grad_velocity, spread, latent_std.contiguous(), key.contiguous(),
            sample_ids.contiguous(), t.contiguous(), grad_mean, grad_spread,
            num_tiles, num_elements, plane, spread.shape[3],
            *grad_z_strides, *grad_z_t_strides, *grad_velocity_strides, *spread_strides,
            SPREAD_IS_STD=spread_is_std, PATCH=patch_size or 0, NUM_BLOCKS=NUM_BLOCKS,
        )  # fmt: skip
    return grad_mean, grad_spread
