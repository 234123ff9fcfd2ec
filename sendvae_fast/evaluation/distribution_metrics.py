"""Metrics of two sets of features: Fréchet distances, Inception score, precision and recall, KID, MIND.

Shape letters: N, M pictures of two sets, D features.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from sendvae_fast.evaluation.extraction import FeatureSet
from sendvae_fast.evaluation.features import FeatureNetwork
from sendvae_fast.evaluation.frechet import FeatureStatistics, frechet_distance, influence
from sendvae_fast.evaluation.intervals import Z_95
from sendvae_fast.evaluation.neighbours import NEIGHBOUR, precision_recall
from sendvae_fast.evaluation.result import Measurement

MetricName = Literal[
    "frechet", "spatial_frechet", "frechet_infinity", "inception_score", "precision_recall", "kid", "mind"
]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
SCORE_SPLIT = 5000
"""Pictures in a split of the Inception score."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
MIND_PICTURES, MIND_PROJECTIONS = 5000, 1000
INFINITY_POINTS, INFINITY_LEAST = 15, 5000


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
    counts, ours = common["counts"], Moments.of(samples.statistics)
    remarks = (*network.remarks, *too_few(counts, network.origin.dim))
    given = () if reference.moments is None else ("the reference's moments are the given file's",)
    theirs = reference.moments or Moments.of(_some(reference.features).statistics)
    described, found = {**common, "remarks": (*remarks, *given)}, []
    if "frechet" in metrics:
        found.append(_with_interval(samples, reference, ours, theirs, described))
    if "frechet_infinity" in metrics and len(samples.pooled) >= 2 * INFINITY_POINTS:
        found.append(Measurement(metric="frechet_infinity", **frechet_infinity(samples.pooled, theirs), **described))
    if "spatial_frechet" not in metrics:
        return found
    spatial = samples.spatial_statistics
    spatial_moments = reference.spatial_moments
    if spatial_moments is None and reference.features is not None and reference.features.spatial_statistics is not None:
        spatial_moments = Moments.of(reference.features.spatial_statistics)
    if spatial is not None and spatial_moments is not None:
        value = _distance(spatial_moments, Moments.of(spatial))
        found.append(Measurement(metric="spatial_frechet", value=value, **described))
    return found


def _with_interval(
    samples: FeatureSet, reference: Reference, ours: Moments, theirs: Moments, described: Mapping
) -> Measurement:
    """frechet, with an interval where there are more pictures than features."""
    value, interval = _distance(theirs, ours), None
    if min(described["counts"].values()) > samples.pooled.shape[1]:
        sides = [(samples.pooled, ours, theirs)]
        if reference.moments is None:
            sides.append((_some(reference.features).pooled, theirs, ours))
        interval = frechet_interval(value, sides)
    return Measurement(
        metric="frechet",
        value=value,
        interval=interval,
        interval_of="the pictures drawn, without the bias of their number" if interval else "",
        **described,
    )


def frechet_interval(value: float, sides: Sequence[tuple[Tensor, Moments, Moments]]) -> tuple[float, float]:
    """95 % by the delta method, for sets drawn independently: (features [N, D], their moments, the other's) each."""
    variance = sum(
        float(influence(features, own.mean, own.covariance, other.mean, other.covariance).var()) / len(features)
        for features, own, other in sides
    )
    return max(value - Z_95 * math.sqrt(variance), 0.0), value + Z_95 * math.sqrt(variance)


def frechet_infinity(samples: Tensor, theirs: Moments) -> dict:
    """The Fréchet distance extrapolated to infinitely many samples (Chong and Forsyth, 2020).

    The distances of 15 random subsets, of `INFINITY_LEAST` pictures (or half of all, where that is less) to all, are
    fitted by a line in 1 / n, whose value at 0 it is.
    """
    num = len(samples)
    sizes = np.linspace(min(INFINITY_LEAST, num // 2), num, INFINITY_POINTS).astype(int)
    rng, distances = np.random.default_rng(0), []
    for size in sizes:
        statistics = FeatureStatistics(samples.shape[1])
        statistics.update(samples[torch.from_numpy(rng.permutation(num)[:size])])
        distances.append(_distance(theirs, Moments.of(statistics)))
    slope, value = np.polyfit(1 / sizes, distances, 1)
    return {"value": float(value), "details": {"slope": float(slope), "least_pictures": int(sizes[0])}}


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


def kernel_distance(samples: Tensor, reference: Tensor) -> dict:
    """KID (Binkowski et al., 2018) by torch-fidelity: cubic kernel, the mean over 100 subsets of 1000 pictures."""
    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    found = kid_features_to_metric(
        samples, reference, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    details = {"deviation": found["kernel_inception_distance_std"], "subset_size": size}
    return {"value": found["kernel_inception_distance_mean"], "details": details}


def monge_distance(samples: Tensor, reference: Tensor, device: torch.device) -> dict:
    """MIND (Berthet et al., 2026): 3 D times the mean squared distance of sorted projections on random directions.

    `MIND_PICTURES` of each set, or as many as the smaller one has, and `MIND_PROJECTIONS` directions. Of two Gaussians
    that differ in their means by δ it is 3 |δ|².
    """
    num = min(MIND_PICTURES, len(samples), len(reference))
    rng = np.random.default_rng(0)
    sides = [features[torch.from_numpy(rng.permutation(len(features))[:num])] for features in (samples, reference)]
    directions = torch.from_numpy(rng.standard_normal((samples.shape[1], MIND_PROJECTIONS), dtype=np.float32))
    directions = (directions / directions.norm(dim=0)).to(device)
    ours, theirs = ((features.to(device) @ directions).sort(dim=0).values for features in sides)
    value = 3 * samples.shape[1] * float((ours - theirs).square().double().mean())
    return {"value": value, "details": {"pictures": num, "projections": MIND_PROJECTIONS}}


def too_few(counts: Mapping[str, int], dim: int) -> tuple[str, ...]:
    """A remark where there are fewer pictures than features: the covariances are singular then."""
    fewest = min(counts.values())
    if fewest > dim:
        return ()
    return (f"{fewest:,} pictures are no more than {dim:,} features: the distance is too large by an unknown amount",)


def _distance(theirs: Moments, ours: Moments) -> float:
    return frechet_distance(theirs.mean, theirs.covariance, ours.mean, ours.covariance)


def _some(features: FeatureSet | None) -> FeatureSet:
    assert features is not None, "a reference without pictures has moments"
    return features
