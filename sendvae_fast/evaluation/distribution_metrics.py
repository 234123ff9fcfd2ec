"""Metrics of two sets of features: Fréchet distances, Inception score, precision and recall, KID, MIND.

Shape letters: N, M pictures of two sets, D features.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from sendvae_fast.evaluation.extraction import FeatureSet
from sendvae_fast.evaluation.features import FeatureNetwork
from sendvae_fast.evaluation.frechet import FeatureStatistics, frechet_distance, influence
from sendvae_fast.evaluation.intervals import Z_95
from sendvae_fast.evaluation.kernel_distance import kernel_distance
from sendvae_fast.evaluation.monge_distance import monge_distance
from sendvae_fast.evaluation.neighbours import NEIGHBOUR, precision_recall
from sendvae_fast.evaluation.result import Measurement
from sendvae_fast.evaluation.settings import METRICS, MetricName

SCORE_SPLIT = 5000
"""Pictures in a split of the Inception score."""
INFINITY_POINTS, INFINITY_LEAST = 15, 5000
T = TypeVar("T")


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, statistics: FeatureStatistics) -> Moments:
        """Of what was accumulated."""
        return cls(statistics.mean, statistics.covariance)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: features of pictures, moments that were computed elsewhere, or both."""

    features: FeatureSet | None
    moments: Moments | None = None
    """In place of the features' own."""
    spatial_moments: Moments | None = None


def distribution_metrics(
    samples: FeatureSet,
    reference: Reference,
    network: FeatureNetwork,
    device: torch.device,
    metrics: Collection[MetricName] = METRICS,
) -> list[Measurement]:
    """The metrics that are asked for and that the features allow, named and described as the network's.

    Args:
        samples: features of N pictures.
        reference: of M pictures, or moments.
        network: that the features are of.
        device: for nearest neighbours and projections.
        metrics: by the names that hold for any network.
    """
    counts = {"samples": len(samples.pooled)}
    if reference.features is not None:
        counts["reference"] = len(reference.features.pooled)
    common = {"protocol": network.protocol, "features": network.origin, "counts": counts, "remarks": network.remarks}
    found = _frechet_metrics(samples, reference, network, common, metrics)
    if samples.logits is not None and "inception_score" in metrics:
        found.append(inception_score(samples.logits, Measurement(metric="inception_score", value=0, **common)))
    if reference.features is not None:
        theirs = reference.features.pooled
        if "precision_recall" in metrics:
            found += neighbour_metrics(samples.pooled, theirs, device, common)
        if "kid" in metrics:
            found.append(Measurement(metric="kid", **kernel_distance(samples.pooled, theirs), **common))
        if "mind" in metrics:
            found.append(Measurement(metric="mind", **monge_distance(samples.pooled, theirs, device), **common))
    return [replace(item, metric=network.metric(item.metric)) for item in found]


def _frechet_metrics(
    samples: FeatureSet,
    reference: Reference,
    network: FeatureNetwork,
    common: Mapping,
    metrics: Collection[MetricName],
) -> list[Measurement]:
    """frechet, frechet_infinity, and where there are spatial features spatial_frechet."""
    remarks = (*network.remarks, *too_few(common["counts"], network.origin.dim))
    given = () if reference.moments is None else ("the reference's moments are the given file's",)
    described, found = {**common, "remarks": (*remarks, *given)}, []
    theirs = None if reference.moments is not None else reference.features
    if {"frechet", "frechet_infinity"} & set(metrics):
        pair = Pair(samples.pooled, Moments.of(samples.statistics), None if theirs is None else theirs.pooled,
                    reference.moments or Moments.of(_some(reference.features).statistics))  # fmt: skip
        if "frechet" in metrics:
            found.append(Measurement(metric="frechet", **frechet(pair), **described))
        if "frechet_infinity" in metrics and len(samples.pooled) >= 2 * INFINITY_POINTS:
            found.append(Measurement(metric="frechet_infinity", **frechet_infinity(pair), **described))
    if "spatial_frechet" in metrics and samples.spatial is not None:
        moments, features = reference.spatial_moments, None
        if moments is None and reference.features is not None and reference.features.spatial is not None:
            features, moments = reference.features.spatial, Moments.of(_some(reference.features.spatial_statistics))
        if moments is not None:
            pair = Pair(samples.spatial, Moments.of(_some(samples.spatial_statistics)), features, moments)
            found.append(Measurement(metric="spatial_frechet", **frechet(pair), **described))
    return found


@dataclass(frozen=True)
class Pair:
    """Samples and what they are compared with."""

    samples: Tensor
    """[N, D]."""
    ours: Moments
    """Of the samples."""
    reference: Tensor | None
    """[M, D]; None where only its moments are known, which then have no error."""
    theirs: Moments
    """Of the reference."""

    @property
    def distance(self) -> float:
        """The Fréchet distance."""
        return _distance(self.theirs, self.ours)

    @cached_property
    def influences(self) -> list[Tensor] | None:
        """How much each picture moves the distance: float64 [N] and, of a reference with pictures, [M].

        None where pictures are no more than features.
        """
        sides = [(self.samples, self.ours, self.theirs)]
        if self.reference is not None:
            sides.append((self.reference, self.theirs, self.ours))
        if min(len(features) for features, *_ in sides) <= self.samples.shape[1]:
            return None
        return [
            influence(features, own.mean, own.covariance, other.mean, other.covariance)
            for features, own, other in sides
        ]


def frechet(pair: Pair) -> dict:
    """Value and interval, where there are more pictures than features: 95 % by the delta method."""
    if pair.influences is None:
        return {"value": pair.distance}
    variance = sum(float(one.var()) / len(one) for one in pair.influences)
    return _with_interval(pair.distance, variance)


def frechet_infinity(pair: Pair) -> dict:
    """The Fréchet distance extrapolated to infinitely many samples (Chong and Forsyth, 2020), with an interval.

    The distances of 15 random subsets, of `INFINITY_LEAST` pictures (or half of all, where that is less) to all, are
    fitted by a line in 1 / n, whose value at 0 it is. That is a sum of the distances with known weights, and each of
    these is to first order a mean over its subset: so a sample's share in the result is known, and so is the variance.
    """
    num = len(pair.samples)
    sizes = np.linspace(min(INFINITY_LEAST, num // 2), num, INFINITY_POINTS).astype(int)
    weights = np.linalg.pinv(np.stack([1 / sizes, np.ones(INFINITY_POINTS)], axis=1))
    rng, distances, shares = np.random.default_rng(0), [], np.zeros(num)
    for size, weight in zip(sizes, weights[1], strict=True):
        chosen = rng.permutation(num)[:size]
        statistics = FeatureStatistics(pair.samples.shape[1])
        statistics.update(pair.samples[torch.from_numpy(chosen)])
        distances.append(_distance(pair.theirs, Moments.of(statistics)))
        shares[chosen] += weight / size
    slope, value = (float(number) for number in weights @ distances)
    details = {"slope": slope, "least_pictures": int(sizes[0])}
    if pair.influences is None:
        return {"value": value, "details": details}
    ours, *theirs = pair.influences
    variance = float(ours.var()) * float(np.square(shares).sum())
    variance += sum(float(one.var()) / len(one) for one in theirs)
    return {**_with_interval(value, variance), "details": details}


def _with_interval(value: float, variance: float) -> dict:
    half = Z_95 * math.sqrt(variance)
    interval = max(value - half, 0.0), value + half
    return {
        "value": value,
        "interval": interval,
        "interval_of": "the pictures drawn, without the bias of their number",
    }


def inception_score(logits: Tensor, described: Measurement) -> Measurement:
    """exp of the mean KL divergence of p(y | x) from p(y), over splits of `SCORE_SPLIT` pictures in their order."""
    splits = -(-len(logits) // SCORE_SPLIT)
    score = isc_features_to_metric(logits, splits=splits, shuffle=False)
    value, deviation = score["inception_score_mean"], score["inception_score_std"]
    interval = None
    if splits > 1:
        half = Z_95 * deviation / math.sqrt(splits - 1)
        interval = (value - half, value + half)
    return replace(
        described,
        value=value,
        interval=interval,
        interval_of="splits" if interval else "",
        details={"splits": splits, "deviation": deviation},
        counts={"samples": len(logits)},
    )


def neighbour_metrics(samples: Tensor, reference: Tensor, device: torch.device, common: Mapping) -> list[Measurement]:
    """precision and recall, with Wilson's intervals; none where there are too few pictures for neighbours."""
    if min(len(samples), len(reference)) <= NEIGHBOUR:
        return []
    values = precision_recall(samples.to(device), reference.to(device))
    found = []
    for metric, value, num in zip(("precision", "recall"), values, (len(samples), len(reference)), strict=True):
        interval = binomtest(round(value * num), num).proportion_ci(method="wilson")
        found.append(
            Measurement(
                metric=metric,
                value=value,
                interval=(interval.low, interval.high),
                interval_of="the pictures judged, with the other set's manifold as it is",
                **common,
            )
        )
    return found


def too_few(counts: Mapping[str, int], dim: int) -> tuple[str, ...]:
    """A remark where there are fewer pictures than features: the covariances are singular then."""
    fewest = min(counts.values())
    if fewest > dim:
        return ()
    return (f"{fewest:,} pictures are no more than {dim:,} features: the distance is too large by an unknown amount",)


def _distance(theirs: Moments, ours: Moments) -> float:
    return frechet_distance(theirs.mean, theirs.covariance, ours.mean, ours.covariance)


def _some(value: T | None) -> T:
    assert value is not None, "a reference without pictures has moments, and spatial features have statistics"
    return value
