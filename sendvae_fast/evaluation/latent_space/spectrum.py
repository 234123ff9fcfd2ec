"""Where in frequency the power of latents is: fine noise is what generators find hard to learn.

Shape letters: n pictures, C channels, H latent size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NUM_BANDS = 8


def band_powers(latents: Iterable[Tensor]) -> Tensor:
    """Share of the power of normalised latents in each band of frequencies, float64 [NUM_BANDS], sum 1.

    Bands are rings of equal width by distance from the origin; 1 is half a cycle a pixel along an axis, and the corners
    beyond it belong to the last band. Constant parts (the mean of a channel in a picture) are in the first.

    Args:
        latents: batches [B, C, H, W], of mean 0 and deviation 1 by channel.
    """
    powers = torch.zeros(NUM_BANDS, dtype=torch.float64)
    for batch in latents:
        height, width = batch.shape[-2:]
        rows, columns = (torch.fft.fftfreq(size).abs() * 2 for size in (height, width))
        radius = (rows[:, None].square() + columns.square()).sqrt()
        band = (radius * NUM_BANDS).long().clamp(max=NUM_BANDS - 1).flatten()
        power = torch.fft.fft2(batch.float(), norm="ortho").abs().square().sum(dim=(0, 1)).flatten()
        powers.index_add_(0, band, power.double().cpu())
    return powers / powers.sum()
