"""MIND (Berthet et al., 2026) with its interval.

Shape letters: n pictures of either set, D features, P projections.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.evaluation.intervals import Z_95

MIND_PICTURES, MIND_PROJECTIONS = 5000, 1000


def monge_distance(samples: Tensor, reference: Tensor, device: torch.device) -> dict:
    """Value, interval and details: 3 D times the mean squared distance of sorted projections on random directions.

    `MIND_PICTURES` of each set, or as many as the smaller one has, and `MIND_PROJECTIONS` directions. Of two Gaussians
    that differ in their means by δ it is 3 |δ|². The interval is the delta method's: each projection's squared
    Wasserstein distance moves with a picture by its Kantorovich potential, ∫ 2 (t - T(t)) dt up to it, where T maps one
    set to the other. The scatter of the directions is added; the bias, which falls with n, is not in it.

    Args:
        samples: [N, D].
        reference: [M, D].
        device: to work on.
    """
    num, dim = min(MIND_PICTURES, len(samples), len(reference)), samples.shape[1]
    rng = np.random.default_rng(0)
    sides = [features[torch.from_numpy(rng.permutation(len(features))[:num])] for features in (samples, reference)]
    directions = torch.from_numpy(rng.standard_normal((dim, MIND_PROJECTIONS), dtype=np.float32))
    directions = (directions / directions.norm(dim=0)).to(device)
    ours, theirs = ((features.to(device) @ directions).sort(dim=0) for features in sides)
    squares = (ours.values - theirs.values).square().double().mean(dim=0)  # [P]
    value = 3 * dim * float(squares.mean())
    found = {"value": value, "details": {"pictures": num, "projections": MIND_PROJECTIONS}}
    if num < 2:
        return found
    moved = [_influence(own.values, own.indices, other.values) for own, other in ((ours, theirs), (theirs, ours))]
    variance = sum(float(one.var()) for one in moved) / num + float(squares.var()) / MIND_PROJECTIONS
    half = 3 * dim * Z_95 * sqrt(variance)
    return {
        **found,
        "interval": (max(value - half, 0.0), value + half),
        "interval_of": "the pictures drawn, without the bias of their number, and the directions",
    }


def _influence(ordered: Tensor, order: Tensor, other: Tensor) -> Tensor:
    """How much each picture moves the mean squared distance, up to a constant: float64 [n].

    Args:
        ordered: a set's sorted projections [n, P].
        order: whose they are [n, P].
        other: the other set's sorted projections.
    """
    gaps = (ordered - other).double()
    steps = ordered.diff(dim=0).double() * (gaps[1:] + gaps[:-1])  # ∫ 2 (t - T(t)) dt by the trapezoidal rule
    potential = torch.cat([torch.zeros_like(gaps[:1]), steps.cumsum(dim=0)])
    potential -= potential.mean(dim=0)
    moved = torch.zeros(len(ordered), dtype=torch.float64, device=ordered.device)
    return moved.index_add_(0, order.flatten(), potential.flatten()) / ordered.shape[1]
