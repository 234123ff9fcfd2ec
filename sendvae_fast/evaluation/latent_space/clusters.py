"""How far apart classes lie in latents: a silhouette score, and t-SNE in the plane as in ReaLS' Fig. 1a.

ReaLS (arXiv:2502.00359) does not say how its figure was made. Here a picture's vector is its normalised latent, every
position of it, on its first 50 principal components: as t-SNE's authors reduce their data (van der Maaten & Hinton,
JMLR 2008). The silhouette (Rousseeuw, 1987) is of these vectors, not of the plane.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NUM_COMPONENTS = 50
PERPLEXITY = 30.0
"""Of t-SNE, where there are pictures enough."""
RANDOM_STATE = 0


class Clusters(NamedTuple):
    """Pictures' vectors by class."""

    points: np.ndarray
    """Where t-SNE puts them, float32 [n, 2]."""
    silhouette: np.ndarray
    """Of each picture, -1 (among another class) to 1 (its class is far from all others), float64 [n]."""


def spread_over_classes(labels: np.ndarray, num_pictures: int, num_classes: int) -> np.ndarray:
    """Ids of pictures, class by class: as many of each class, from classes all over the list.

    Args:
        labels: class of each picture, int64 [N].
        num_pictures: ids at most, but one of each class at least.
        num_classes: classes at most.

    Returns:
        int64 [n].
    """
    present = np.unique(labels)
    chosen = present[_evenly(len(present), num_classes)]
    of_each = max(1, num_pictures // len(chosen))
    return np.concatenate([np.flatnonzero(labels == label)[:of_each] for label in chosen])


def has_clusters(labels: np.ndarray) -> bool:
    """Whether a silhouette is defined: for two classes or more, of which one has more than one picture."""
    return 2 <= len(np.unique(labels)) < len(labels)


def clusters(latents: np.ndarray, labels: np.ndarray) -> Clusters:
    """Of normalised latents [n, ...] and their classes int64 [n], for which `has_clusters`.

    On one thread, because the sums of several come out in other orders, which t-SNE carries into other pictures.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_samples
    from threadpoolctl import threadpool_limits

    flat = latents.reshape(len(latents), -1).astype(np.float32)
    with threadpool_limits(1):
        vectors = PCA(min(NUM_COMPONENTS, *flat.shape), svd_solver="full").fit_transform(flat)
        perplexity = min(PERPLEXITY, (len(flat) - 1) / 3)
        plane = TSNE(2, perplexity=perplexity, random_state=RANDOM_STATE).fit_transform(vectors)
        return Clusters(plane, np.asarray(silhouette_samples(vectors, labels), np.float64))


def _evenly(num: int, most: int) -> np.ndarray:
    """At most `most` of 0 .. num - 1, from the first to the last."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(np.int64))
