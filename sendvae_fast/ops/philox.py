"""Counter-based random numbers: Philox4x32-10 of (seed, step, stream, sample id, element).

Philox is a keyed bijection of 128-bit counters (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
Every random number of this package is one word of it, so nothing depends on the rank, the world size or the position in
the batch, and there is no state to save. This module is the definition; C++, CUDA and Triton agree with it: the same
32-bit words, normals equal to fp32 rounding.

    key      (low, high) halves of splitmix64(splitmix64(seed) + step)
    counter  (element // 4, stream, sample_id low 32 bits, sample_id high 32 bits); the element takes word element % 4

All arithmetic runs on int64 tensors on the key's device, without a host synchronisation, so it is safe to capture in a
CUDA graph and to trace with torch.compile. A product of two 32-bit words wraps around in int64, which leaves all of its
64 bits in place. It is the reference, not the fast path: a word costs tens of bytes of temporary memory.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch

MASK32 = 0xFFFFFFFF
ROUNDS = 10
# Multipliers and Weyl increments of Philox4x32.
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """The uses of random numbers. Numbers of different streams are independent."""

    POSTERIOR = 0
    INTERPOLANT = 1
    TIME = 2
    LABEL_DROPOUT = 3
    SAMPLER_INIT = 4
    SAMPLER_STEP = 5
    SAMPLER_LABEL = 6
    ORDER = 7
    SYNTHETIC = 8
    FLIP = 9


def make_key(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The key tensor (seed, step), int64 [2] on `device`; both are taken modulo 2^64.

    Built once outside a CUDA graph; copy a new key into the same tensor before each replay.
    """
    # Not made on the device: the host would wait for all that is queued there, at the start of every step.
    key = torch.tensor([_signed64(seed), _signed64(step)], dtype=torch.int64, device="cpu")
    return key.to(device, non_blocking=True)


def words(key: torch.Tensor, stream: int, sample_ids: torch.Tensor, num: int) -> torch.Tensor:
    """Raw 32-bit words of elements 0 .. num - 1 of each sample, as int64 [B, num] in [0, 2^32).

    Args:
        key: int64 [2], (seed, step), see `make_key`.
        stream: a `Stream`.
        sample_ids: int64 [B].
        num: words per sample, below 2^34.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    _check(key, sample_ids)
    num_blocks = -(-num // 4)
    counter = torch.arange(num_blocks, device=key.device)[None, :]  # [1, num_blocks]
    ids = sample_ids[:, None]  # [B, 1]
    block = philox4x32(
        (counter, torch.full_like(counter, int(stream)), ids & MASK32, (ids >> 32) & MASK32), derive_key(key)
    )
    return torch.stack(torch.broadcast_tensors(*block), dim=-1).flatten(1)[:, :num]


def uniform(key: torch.Tensor, stream: int, sample_ids: torch.Tensor, num: int) -> torch.Tensor:
    """Uniform numbers strictly inside (0, 1): `((word >> 9) + 0.5) 2^-23`, float32 [B, num], exact in float32.

    Arguments and errors as for `words`.
    """
    return _to_uniform(words(key, stream, sample_ids, num), torch.float32)


def normal(
    key: torch.Tensor,
    stream: int,
    sample_ids: torch.Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal numbers [B, *shape] by Box-Muller on the word pairs (0, 1) and (2, 3) of each block.

        r = sqrt(-2 ln u0);  (r cos 2πu1, r sin 2πu1)

    Elements are numbered in the C order of `shape`. The largest magnitude is sqrt(48 ln 2) = 5.77. `dtype` is the
    arithmetic's: float64 gives the exact value that float32 rounds. Other arguments and errors as for `words`.
    """
    num = math.prod(shape)
    even = words(key, stream, sample_ids, num + num % 2).unflatten(1, (-1, 2))  # [B, pairs, 2]
    u0, u1 = _to_uniform(even, dtype).unbind(-1)
    radius, angle = torch.sqrt(-2.0 * torch.log(u0)), (2.0 * math.pi) * u1
    pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pair.flatten(1)[:, :num].reshape(sample_ids.shape[0], *shape)


def integers(key: torch.Tensor, stream: int, sample_ids: torch.Tensor, num: int, high: int) -> torch.Tensor:
    """Integers in [0, high): `word * high >> 32`, int64 [B, num]; `high` in [1, 2^31].

    A value's probability differs from 1 / high by less than 2^-32: too little to show in any number of draws made here.

    Raises:
        ValueError: `high` out of range, or as for `words`.
    """
    if not 1 <= high <= 2**31:
        raise ValueError(f"high must be in [1, 2^31], got {high}")
    return (words(key, stream, sample_ids, num) * high) >> 32


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox4x32: four counter words and two key words to four random words.

    Each is an int64 tensor with values in [0, 2^32); shapes broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & MASK32) ^ c1 ^ k0,
            product_1 & MASK32,
            ((product_0 >> 32) & MASK32) ^ c3 ^ k1,
            product_0 & MASK32,
        )
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return c0, c1, c2, c3


def derive_key(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two key words (low, high) of int64 [2] (seed, step), each an int64 scalar tensor in [0, 2^32)."""
    seed, step = key.unbind()
    mixed = splitmix64(splitmix64(seed) + step)
    return mixed & MASK32, (mixed >> 32) & MASK32


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """The first output of the SplitMix64 generator seeded with `x`, modulo 2^64, on int64 tensors.

    It adds 0x9E3779B97F4A7C15 before it mixes, so `splitmix64(0)` is 0xE220A8397B1DCDAF.
    """
    x = x + _signed64(0x9E3779B97F4A7C15)
    x = (x ^ _logical_shift_right(x, 30)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _logical_shift_right(x, 27)) * _signed64(0x94D049BB133111EB)
    return x ^ _logical_shift_right(x, 31)


def _logical_shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed64(value: int) -> int:
    """The int64 with the same 64 bits as `value` modulo 2^64."""
    return (int(value) + 2**63) % 2**64 - 2**63


def _to_uniform(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def _check(key: torch.Tensor, sample_ids: torch.Tensor) -> None:
    if key.dtype != torch.int64 or key.shape != (2,):
        raise ValueError(f"key must be int64 [2] (philox.make_key), got {key.dtype} {list(key.shape)}")
    if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1:
        raise ValueError(f"sample_ids must be int64 [B], got {sample_ids.dtype} {list(sample_ids.shape)}")
    if key.device != sample_ids.device:
        raise ValueError(f"key is on {key.device}, sample_ids on {sample_ids.device}: put both on one device")
