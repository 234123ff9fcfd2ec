"""Philox4x32-10 inside Triton kernels: the same words as `sendvae_fast.ops.philox`, which defines them."""

import triton
import triton.language as tl

from sendvae_fast.ops import philox

_ROUNDS = tl.constexpr(philox.ROUNDS)
_MULTIPLIER_0 = tl.constexpr(philox.MULTIPLIER_0)
_MULTIPLIER_1 = tl.constexpr(philox.MULTIPLIER_1)
_WEYL_0 = tl.constexpr(philox.WEYL_0)
_WEYL_1 = tl.constexpr(philox.WEYL_1)


@triton.jit
def _splitmix64(x):
    """The first output of SplitMix64 seeded with the uint64 `x`."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def derive_key(key_ptr):
    """The two uint32 key words of the int64 pair (seed, step) at `key_ptr`."""
    seed = tl.load(key_ptr).to(tl.uint64, bitcast=True)
    step = tl.load(key_ptr + 1).to(tl.uint64, bitcast=True)
    mixed = _splitmix64(_splitmix64(seed) + step)
    return mixed.to(tl.uint32), (mixed >> 32).to(tl.uint32)


@triton.jit
def block_words(key_0, key_1, stream: tl.constexpr, sample_id, block):
    """The four uint32 words of each Philox block: `block` is uint32 [N] (element // 4), `sample_id` a scalar int64."""
    sample_id = sample_id.to(tl.uint64, bitcast=True)
    c0 = block
    c1 = tl.full(block.shape, stream, tl.uint32)
    c2 = tl.zeros(block.shape, tl.uint32) + sample_id.to(tl.uint32)
    c3 = tl.zeros(block.shape, tl.uint32) + (sample_id >> 32).to(tl.uint32)
    multiplier_0 = tl.full(block.shape, _MULTIPLIER_0, tl.uint32)
    multiplier_1 = tl.full(block.shape, _MULTIPLIER_1, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high_0, low_0 = tl.umulhi(c0, multiplier_0), c0 * multiplier_0
        high_1, low_1 = tl.umulhi(c2, multiplier_1), c2 * multiplier_1
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0 += tl.full((), _WEYL_0, tl.uint32)
        key_1 += tl.full((), _WEYL_1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def to_uniform(word):
    """float32 in (0, 1): ((word >> 9) + 0.5) 2^-23, exact."""
    # Through int32, which has a direct conversion instruction; the value is below 2^23.
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _sincos_turns(k):
    """sin and cos of 2 pi (k + 0.5) 2^-23, k a uint32 below 2^23.

    The reduction to an eighth of a turn is exact on the integer, and the polynomials (csrc/common/math.h has the same)
    need no slow path for large angles, which in tl.cos is most of the code and spills to local memory.
    """
    quadrant = (k + (1 << 20)) >> 21  # nearest quarter turn
    offset = k.to(tl.int32) - (quadrant << 21).to(tl.int32)
    r = (offset.to(tl.float32) + 0.5) * 1.1920928955078125e-07  # turns, |r| <= 1/8
    square = r * r
    sin = ((-75.4456033 * square + 81.5937667) * square - 41.3416723) * square - 1.7484556e-7
    sin = r * 6.2831855 + r * sin  # 2 pi in two parts
    cos = ((59.2459642 * square - 85.4437417) * square + 64.9393265) * square - 19.7392087
    cos = 1.0 + cos * square
    odd = (quadrant & 1) != 0
    swapped_sin, swapped_cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    sin = tl.where((quadrant & 2) != 0, -swapped_sin, swapped_sin)
    cos = tl.where(((quadrant + 1) & 2) != 0, -swapped_cos, swapped_cos)
    return sin, cos


@triton.jit
def _normal_pair(word_0, word_1):
    """Box-Muller: two float32 normals from two words."""
    # tl.sqrt is approximate on NVIDIA GPUs, sqrt_rn and tl.log are not.
    radius = tl.sqrt_rn(-2.0 * tl.log(to_uniform(word_0)))
    sin, cos = _sincos_turns(word_1 >> 9)
    return radius * cos, radius * sin


@triton.jit
def normals(key_0, key_1, stream: tl.constexpr, sample_id, block):
    """float32 normals [4 N] of N consecutive Philox blocks, in element order. Arguments as for `block_words`."""
    word_0, word_1, word_2, word_3 = block_words(key_0, key_1, stream, sample_id, block)
    normal_0, normal_1 = _normal_pair(word_0, word_1)
    normal_2, normal_3 = _normal_pair(word_2, word_3)
    # Two interleavings put elements 0, 1, 2, 3 side by side in one thread's registers: loads and stores stay coalesced.
    return tl.interleave(tl.interleave(normal_0, normal_2), tl.interleave(normal_1, normal_3))
