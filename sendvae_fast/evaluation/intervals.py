"""Confidence intervals."""

import math

from torch import Tensor

Z_95 = 1.959964
"""Of the normal distribution, two-sided."""


def interval_of_mean(value: float, terms: Tensor, least: float = -math.inf) -> tuple[float, float]:
    """95 % interval around `value`, which changes with the mean of independent terms [N], N > 1; not below `least`."""
    half = Z_95 * math.sqrt(float(terms.double().var()) / len(terms))
    return max(value - half, least), value + half
