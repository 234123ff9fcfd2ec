"""Metrics of feature sets against closed forms, Monte Carlo and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from sendvae_fast.evaluation import distribution_metrics
from sendvae_fast.evaluation.distribution_metrics import (
    Moments,
    frechet_infinity,
    frechet_interval,
    inception_score,
    kernel_distance,
    monge_distance,
)
from sendvae_fast.evaluation.frechet import FeatureStatistics, frechet_distance, influence
from sendvae_fast.evaluation.result import Measurement

DIM = 4
# Two Gaussians with full covariances, and their distance in closed form through the covariances' known square roots.
MEANS = np.zeros(DIM), np.array([1.0, 0, -0.5, 0])
FACTORS = np.eye(DIM), np.eye(DIM) + 0.3 * np.ones((DIM, DIM))
TRUTH = float(np.square(MEANS[1]).sum() + np.square(FACTORS[1] - np.eye(DIM)).sum())  # |m|² + |A - I|², A symmetric


def draw(which, num, rng):
    return torch.from_numpy(rng.normal(size=(num, DIM)) @ FACTORS[which] + MEANS[which])


def moments(features):
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return Moments.of(statistics)


def distance(features, other):
    ours, theirs = moments(features), moments(other)
    return frechet_distance(theirs.mean, theirs.covariance, ours.mean, ours.covariance)


def test_intervals_hold_what_they_promise():
    """Of 300 pairs of sets, about 95 % of the intervals hold the true distance (binomial: 91 % to 98.7 %, 3 sigma)."""
    rng, held, deviations, values = np.random.default_rng(0), 0, [], []
    for _ in range(300):
        real, drawn = draw(0, 2000, rng), draw(1, 1000, rng)
        sides = [(drawn, moments(drawn), moments(real)), (real, moments(real), moments(drawn))]
        value = distance(drawn, real)
        low, high = frechet_interval(value, sides)
        held += low <= TRUTH <= high
        values.append(value)
        deviations.append((high - low) / 2 / distribution_metrics.Z_95)
    assert 0.91 <= held / 300 <= 0.987
    assert np.mean(deviations) == pytest.approx(np.std(values), rel=0.13)  # 3 sigma of a deviation from 300 values


def test_influence_is_the_derivative():
    """Of the distance when a vector's weight is raised a little."""
    rng = np.random.default_rng(0)
    real, drawn = draw(0, 500, rng), draw(1, 500, rng)
    theirs = moments(real)
    mean = drawn.mean(dim=0)
    covariance = (drawn - mean).T @ (drawn - mean) / len(drawn)
    expected, step = [], 1e-6
    for x in drawn[:3]:
        weights = torch.full((len(drawn), 1), (1 - step) / len(drawn), dtype=torch.float64)
        weights[(drawn == x).all(dim=1)] += step
        moved_mean = (weights * drawn).sum(dim=0)
        moved = (weights * (drawn - moved_mean)).T @ (drawn - moved_mean)
        before = frechet_distance(theirs.mean, theirs.covariance, mean, covariance)
        after = frechet_distance(theirs.mean, theirs.covariance, moved_mean, moved)
        expected.append((after - before) / step)
    values = influence(drawn, mean, covariance, theirs.mean, theirs.covariance)
    np.testing.assert_allclose(values[:3].numpy(), expected, rtol=1e-3, atol=1e-3)
    assert float(values.mean()) == pytest.approx(0, abs=1e-9)


def test_infinity_takes_off_the_bias_of_few_pictures():
    """The same distribution twice in 32 dimensions: 300 pictures show a distance that is not there."""
    rng = np.random.default_rng(0)
    theirs = Moments(torch.zeros(32, dtype=torch.float64), torch.eye(32, dtype=torch.float64))
    found, plain = [], []
    for _ in range(5):
        samples = torch.from_numpy(rng.normal(size=(300, 32)))
        ours = moments(samples)
        plain.append(frechet_distance(theirs.mean, theirs.covariance, ours.mean, ours.covariance))
        found.append(frechet_infinity(samples, theirs)["value"])
    assert np.mean(plain) > 0.8 and abs(np.mean(found)) < 0.2


def test_inception_score_closed_forms(monkeypatch):
    described = Measurement(metric="inception_score", value=0, protocol="adm")
    certain = 100 * torch.eye(8).repeat(4, 1)  # each picture certainly of one of 8 classes, as often
    assert inception_score(certain, described).value == pytest.approx(8)
    assert inception_score(torch.ones(32, 8), described).value == pytest.approx(1)
    monkeypatch.setattr(distribution_metrics, "SCORE_SPLIT", 16)
    halves = torch.cat([certain[:16], torch.ones(16, 8)])  # splits follow the order of pictures
    score = inception_score(halves, described)
    assert score.value == pytest.approx((8 + 1) / 2) and score.details["splits"] == 2


def test_kid_is_torch_fidelitys():
    rng = np.random.default_rng(0)
    samples, reference = (torch.from_numpy(rng.normal(size=(n, 16)) + s).float() for n, s in ((150, 0.3), (120, 0)))
    theirs = kid_features_to_metric(samples, reference, kid_subsets=100, kid_subset_size=120, verbose=False)
    ours = kernel_distance(samples, reference)
    assert ours["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-12)
    # the cubic kernel's distance of two Gaussians shifted by s in each of D dimensions, to first order in s²
    assert ours["value"] > 0 and kernel_distance(samples[:20], reference)["details"]["subset_size"] == 20


def test_monge_distance_closed_forms(monkeypatch):
    """3 |δ|² of a shift by δ; of scaling by a, 3 D (a - 1)² of the projections' variance, 1."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(distribution_metrics, "MIND_PICTURES", 1000)
    reference = torch.from_numpy(rng.normal(size=(1200, 8))).float()
    shift = torch.tensor([2.0, -1, 0, 0, 0, 0, 0, 0])
    shuffled = reference[torch.from_numpy(rng.permutation(1200))]
    device = torch.device("cpu")
    shifted = monge_distance(shuffled[:1000] + shift, shuffled[:1000], device)
    assert shifted["details"] == {"pictures": 1000, "projections": 1000}
    assert shifted["value"] == pytest.approx(3 * 5, rel=0.15)  # three deviations of the mean over 1000 directions
    scaled = monge_distance(2 * shuffled[:1000], shuffled[:1000], device)
    assert scaled["value"] == pytest.approx(3 * 8 * 1.0, rel=0.15)  # and of the variance of 1000 pictures
    assert monge_distance(shuffled[:1000], shuffled[:1000], device)["value"] < 1e-6
