"""How much noise in latents shows in decoded pictures: a generator's errors are such noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sendvae_fast.ops import philox

NOISE_LEVELS = (0.05, 0.1, 0.2, 0.5)
"""Deviations of the noise, in deviations of each latent channel."""


@torch.no_grad()
def decoder_sensitivity(
    decode: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], std: Tensor, seed: int
) -> dict[float, Tensor]:
    """Root mean square change of each picture over the noise's level, [n] by level.

    Where decoding is linear the levels agree: it is then the Frobenius norm of the decoder, over the root of the number
    of values in a picture, with latent channels scaled to deviation 1.

    Args:
        decode: latents [B, C, H, W] to pictures in [-1, 1].
        batches: (ids int64 [B] of the pictures, their latents); a picture's noise depends on its id alone.
        std: [C], deviation of the latents.
        seed: of the noise.
    """
    found: dict[float, list[Tensor]] = {level: [] for level in NOISE_LEVELS}
    for ids, z in batches:
        key = philox.make_key(seed, 0, z.device)
        noise = philox.normal(key, philox.Stream.INTERPOLANT, ids.to(z.device), z.shape[1:]) * std[:, None, None]
        clean = decode(z)
        for level in NOISE_LEVELS:
            change = (decode(z + level * noise) - clean).float().flatten(1)
            found[level].append(change.square().mean(dim=1).sqrt().cpu() / level)
    return {level: torch.cat(values) for level, values in found.items()}
