"""KID (Binkowski et al., 2018) with its interval.

Shape letters: N, M pictures of two sets, D features.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric

from sendvae_fast.evaluation.intervals import Z_95

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
JACKKNIFE_PICTURES = 4096
"""Of each set, at most, that the variance is taken from: three kernel matrices of 64 MiB."""


def kernel_distance(samples: Tensor, reference: Tensor) -> dict:
    """Value, interval and details by torch-fidelity: cubic kernel, the mean over 100 subsets of 1000 pictures.

    The interval is the infinitesimal jackknife's: the squared MMD moves with each picture by twice its mean kernel with
    its own set less that with the other. For sets that hardly differ that variance is up to twice too large, never too
    small (Efron and Stein, 1981). The scatter of the subsets' choice is added.

    Args:
        samples: [N, D].
        reference: [M, D].
    """
    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    found = kid_features_to_metric(
        samples, reference, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    value, deviation = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
    details = {"deviation": deviation, "subset_size": size}
    if size < 2:
        return {"value": value, "details": details}
    ours, theirs = _mean_differences(_some(samples), _some(reference))
    variance = 4 * float(ours.var()) / len(samples) + 4 * float(theirs.var()) / len(reference)
    half = Z_95 * sqrt(variance + deviation**2 / KID_SUBSETS)
    return {
        "value": value,
        "details": details,
        "interval": (value - half, value + half),
        "interval_of": "the pictures drawn, by a jackknife, and the subsets",
    }


def _mean_differences(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x [N, D] and y [M, D] its mean kernel with the others of its set less that with the other."""
    x, y = x.float(), y.float()
    across = _kernel(x, y)
    found = []
    for own, other in ((x, across.mean(dim=1)), (y, across.mean(dim=0))):
        within = _kernel(own, own).fill_diagonal_(0).sum(dim=1) / (len(own) - 1)
        found.append((within - other).double())
    return found[0], found[1]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _some(features: Tensor) -> Tensor:
    if len(features) <= JACKKNIFE_PICTURES:
        return features
    return features[torch.from_numpy(np.random.default_rng(0).permutation(len(features))[:JACKKNIFE_PICTURES])]
