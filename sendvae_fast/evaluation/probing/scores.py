"""Scores of attribute predictions, with intervals by resampling the pictures.

Shape letters: n pictures, A attributes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_RESAMPLES = 1000
"""Bootstrap resamples of an interval."""


class Estimate(NamedTuple):
    """A score of all pictures and its 95 % percentile interval over resamples of them."""

    value: float
    interval: tuple[float, float]


class F1(NamedTuple):
    """F1 of the positive class. Where nothing is predicted and nothing is there it is 0, as scikit-learn has it."""

    each: list[float]
    """By attribute."""
    macro: Estimate
    """Mean over attributes."""
    micro: Estimate
    """Of all attributes' decisions together."""


def f1_scores(predicted: Tensor, actual: Tensor, seed: int = 0) -> F1:
    """F1 of bool [n, A] predictions against bool [n, A] attributes."""
    counts = torch.cat([predicted & actual, predicted, actual], dim=1)  # hits, predicted, there: [n, 3 A]
    everything, resampled = counts.sum(dim=0, keepdim=True).double(), resampled_sums(counts, seed)
    each = _f1(everything)[0]
    macro, micro = (
        _estimate(of(everything)[0], of(resampled)) for of in (lambda sums: _f1(sums).mean(dim=1), _micro_f1)
    )
    return F1(each.tolist(), macro, micro)


def best_thresholds(logits: Tensor, actual: Tensor) -> Tensor:
    """The logit [A] above which predicting gives each attribute its best F1 on these pictures.

    Half way between two pictures' logits; of several that are as good the highest. 0 (a probability of one half) for an
    attribute that no picture has.

    Args:
        logits: [n, A].
        actual: bool [n, A].
    """
    ordered, order = logits.sort(dim=0, descending=True)
    hits = actual.gather(0, order).cumsum(dim=0).double()
    num_predicted = torch.arange(1, len(logits) + 1, device=logits.device)[:, None]
    f1 = 2 * hits / (num_predicted + actual.sum(dim=0))
    below = torch.cat([ordered[1:], ordered[-1:] - 2])  # what is just not predicted; of all, anything lower
    f1[below == ordered] = -1  # between equal logits there is no threshold
    best = f1.argmax(dim=0, keepdim=True)
    threshold = (ordered.gather(0, best) + below.gather(0, best))[0] / 2
    return torch.where(actual.any(dim=0), threshold, 0.0)


def top_recall(logits: Tensor, actual: Tensor, k: int, seed: int = 0) -> Estimate:
    """The share of all pictures' attributes that are among the k most probable of their picture.

    DeepFashion's measure (Liu et al., CVPR 2016).

    Args:
        logits: [n, A].
        actual: bool [n, A].
        k: how many of a picture's attributes are guessed.
        seed: of the resamples.
    """
    hits = actual.gather(1, logits.topk(k, dim=1).indices).sum(dim=1)
    counts = torch.stack([hits, actual.sum(dim=1)], dim=1)

    def recall(sums: Tensor) -> Tensor:
        return sums[:, 0] / sums[:, 1].clamp(min=1)

    return _estimate(recall(counts.sum(dim=0, keepdim=True).double())[0], recall(resampled_sums(counts, seed)))


def mean_with_interval(values: Tensor, seed: int = 0) -> Estimate:
    """The mean of a value of each picture [n]."""
    return estimate_of_means(values[:, None], lambda means: means[:, 0], seed)


def estimate_of_means(values: Tensor, function: Callable[[Tensor], Tensor], seed: int = 0) -> Estimate:
    """A function of the means over pictures of values [n, k]: it takes means [R, k] to [R]."""
    resampled = resampled_sums(values, seed) / len(values)
    return _estimate(function(values.double().mean(dim=0, keepdim=True))[0], function(resampled))


def resampled_sums(counts: Tensor, seed: int, num_resamples: int = NUM_RESAMPLES) -> Tensor:
    """Column sums of counts [n, k] over bootstrap resamples of their rows: float64 [R, k]."""
    rng, num, sums = np.random.default_rng(seed), len(counts), []
    counts = counts.float()
    while sum(map(len, sums)) < num_resamples:
        size = min(50, num_resamples - sum(map(len, sums)))
        drawn = torch.from_numpy(rng.integers(num, size=(size, num))).to(counts.device)
        times = torch.zeros(size, num, device=counts.device).scatter_add_(1, drawn, torch.ones_like(drawn).float())
        sums.append((times @ counts).double())  # exact for counts, which are below 2^24
    return torch.cat(sums)


def _f1(sums: Tensor) -> Tensor:
    """F1 [R, A] of sums [R, 3 A]."""
    hits, predicted, actual = sums.chunk(3, dim=1)
    return 2 * hits / (predicted + actual).clamp(min=1)


def _micro_f1(sums: Tensor) -> Tensor:
    hits, predicted, actual = (part.sum(dim=1) for part in sums.chunk(3, dim=1))
    return 2 * hits / (predicted + actual).clamp(min=1)


def _estimate(value: Tensor, resampled: Tensor) -> Estimate:
    low, high = np.percentile(resampled.cpu().numpy(), [2.5, 97.5])
    return Estimate(float(value), (float(low), float(high)))
