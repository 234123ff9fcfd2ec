"""How evenly latents fill their space: the measure of LightningDiT's `tools/latent_vis.py`.

One random position of each of up to 10,000 random pictures gives points [n, C], normalised by channel; t-SNE brings
them to the plane (scikit-learn, perplexity 30, 1000 iterations, random_state 42); a Gaussian kernel density estimate
(scipy) is taken at the points themselves. Of these densities: coefficient of variation, Gini coefficient, normalised
entropy. The mean of several runs with other pictures and positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.latent_space.settings import LEAST_POINTS, UniformityConfig
from sendvae_fast.progress import Progress

PERPLEXITY = 30


class Uniformity(NamedTuple):
    """Of densities at points; arrays hold a value of each run."""

    variation: np.ndarray
    """Standard deviation over mean: 0 where all are equal."""
    gini: np.ndarray
    """0 where all are equal, towards 1 where one has all."""
    entropy: np.ndarray
    """Over its largest value: 1 where all are equal."""


def uniformity(latents: np.ndarray, config: UniformityConfig, seed: int) -> Uniformity:
    """Of normalised latents [n, C, H, W].

    Raises:
        UserError: there are fewer than `LEAST_POINTS`.
    """
    from scipy.stats import gaussian_kde
    from sklearn.manifold import TSNE

    num, _, height, width = latents.shape
    check_number(num)
    runs = []
    with Progress("uniformity", config.num_runs, unit="run") as progress:
        for run in range(config.num_runs):
            rng = np.random.default_rng([seed, run])
            ids = rng.choice(num, size=min(num, config.num_points), replace=False)
            rows, columns = rng.integers(height, size=len(ids)), rng.integers(width, size=len(ids))
            points = latents[ids, :, rows, columns].astype(np.float32)
            plane = TSNE(2, perplexity=PERPLEXITY, max_iter=1000, random_state=42).fit_transform(points).T
            runs.append(spread_of(gaussian_kde(plane)(plane)))
            progress.advance(1, gini=runs[-1][1])
    return Uniformity(*np.array(runs).T)


def check_number(num_pictures: int) -> None:
    """Raise UserError unless there are enough pictures."""
    if num_pictures < LEAST_POINTS:
        raise UserError(
            f"uniformity needs {LEAST_POINTS} pictures, not {num_pictures}: give more or leave it out of measures"
        )


def spread_of(density: np.ndarray) -> tuple[float, float, float]:
    """(coefficient of variation, Gini coefficient, normalised entropy) of densities [n]."""
    num, total = len(density), density.sum()
    gini = ((2 * np.arange(1, num + 1) - num - 1) * np.sort(density)).sum() / (num * total)
    share = density / total
    return density.std() / density.mean(), gini, -(share * np.log2(share + 1e-10)).sum() / np.log2(num)
