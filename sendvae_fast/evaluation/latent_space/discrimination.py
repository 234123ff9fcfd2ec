"""How few modes describe latents: MAETok's measure (Chen et al., ICML 2025, appendix B.3).

Flattened latents through PCA to a fixed number of dimensions, standardised; Gaussian mixtures of several sizes are
fitted to them (both by scikit-learn). The lower the negative log-likelihood, the clearer the modes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.latent_space.settings import DiscriminationConfig
from sendvae_fast.progress import Progress

PICTURES_PER_COMPONENT = 10
"""At least so many: a mixture of fewer describes single pictures."""


class Discrimination(NamedTuple):
    """Of one set of latents."""

    nll: dict[int, float]
    """Negative log-likelihood in nats per fitted picture, by components."""
    held_out_nll: dict[int, float]
    """The same of pictures that were not fitted: far above the other where a mixture describes single pictures."""
    explained: float
    """Share of the variance that the PCA keeps; MAETok asks for more than 0.9."""
    num_pictures: int
    """Fitted."""


def discrimination(features: np.ndarray, config: DiscriminationConfig, seed: int) -> Discrimination:
    """Of flattened latents [n, d].

    Raises:
        UserError: there are too few for the smallest mixture.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    rng, num = np.random.default_rng(seed), min(len(features), config.num_pictures)
    ids = np.sort(rng.choice(len(features), size=num, replace=False))
    sizes = sizes_for(num, config)
    pca = PCA(min(config.num_dims, features.shape[1], num), svd_solver="randomized", random_state=seed)
    x = pca.fit_transform(features[ids].astype(np.float32)).astype(np.float64)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    is_held_out = rng.permutation(num) < num // 10
    nll, held_out_nll = {}, {}
    with Progress("discrimination", len(sizes), unit="mixture") as progress:
        for size in sizes:
            mixture = GaussianMixture(size, random_state=seed).fit(x[~is_held_out])
            nll[size] = -float(mixture.score(x[~is_held_out]))
            held_out_nll[size] = -float(mixture.score(x[is_held_out]))
            progress.advance(1, nll=nll[size])
    return Discrimination(nll, held_out_nll, float(pca.explained_variance_ratio_.sum()), num - num // 10)


def sizes_for(num_pictures: int, config: DiscriminationConfig) -> list[int]:
    """The mixtures that there are enough pictures for. Raises UserError if there are none."""
    sizes = [size for size in config.components if size * PICTURES_PER_COMPONENT <= num_pictures]
    if not sizes:
        least = min(config.components)
        raise UserError(
            f"a mixture of {least} Gaussians needs {least * PICTURES_PER_COMPONENT} pictures, not {num_pictures}: give "
            "more, fewer discrimination.components, or leave it out of measures"
        )
    return sizes
