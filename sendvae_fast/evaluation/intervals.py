"""Confidence intervals."""

import math
from collections.abc import Sequence

from torch import Tensor

Z_95 = 1.959964
"""Of the normal distribution, two-sided."""


def interval_of_mean(value: float, terms: Tensor, least: float = -math.inf) -> tuple[float, float]:
    """95 % interval around `value`, which changes with the mean of independent terms [N], N > 1; not below `least`."""
    half = Z_95 * math.sqrt(float(terms.double().var()) / len(terms))
    return max(value - half, least), value + half


def interval_over_runs(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of independent runs, such as seeds, by Student's t; None of one run."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean - half, mean + half
