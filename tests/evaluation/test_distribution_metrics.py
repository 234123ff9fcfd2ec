"""Metrics of feature sets against closed forms, Monte Carlo and torch-fidelity."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from sendvae_fast.evaluation import distribution_metrics
from sendvae_fast.evaluation import kernel_distance as kernel_module
from sendvae_fast.evaluation import monge_distance as monge_module
from sendvae_fast.evaluation.chunks import Chunks
from sendvae_fast.evaluation.distribution_metrics import (
    Moments,
    Pair,
    Reference,
    frechet,
    frechet_infinity,
    inception_score,
)
from sendvae_fast.evaluation.distribution_metrics import (
    distribution_metrics as measure,
)
from sendvae_fast.evaluation.extraction import FeatureSet
from sendvae_fast.evaluation.frechet import FeatureStatistics, frechet_distance, influence
from sendvae_fast.evaluation.kernel_distance import kernel_distance
from sendvae_fast.evaluation.monge_distance import monge_distance
from sendvae_fast.evaluation.result import FeaturesOrigin, Measurement

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
        found = frechet(Pair(drawn, moments(drawn), real, moments(real)))
        value, (low, high) = found["value"], found["interval"]
        assert value == distance(drawn, real)
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
        found.append(frechet_infinity(Pair(samples, ours, None, theirs))["value"])
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
    monkeypatch.setattr(monge_module, "MIND_PICTURES", 1000)
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


TRIALS = 150
# Of 150 intervals of 95 % between 134 and 150 hold the truth, by the binomial distribution, but for one time in 1,000.
LEAST_HELD = 134


def check_coverage(found, truth):
    """Intervals hold the truth as often as they promise, and are no wider than that asks for."""
    held = sum(low <= truth <= high for low, high in (one["interval"] for one in found))
    widths = [(high - low) / 2 / distribution_metrics.Z_95 for low, high in (one["interval"] for one in found)]
    assert held >= LEAST_HELD
    return np.mean(widths) / np.std([one["value"] for one in found])


def test_intervals_of_infinity_hold_what_they_promise():
    """15 subsets of the samples share pictures; a deviation of 150 values is known to 6 %: 3 of its sigma are 18 %."""
    rng, found = np.random.default_rng(0), []
    for _ in range(TRIALS):
        real, drawn = draw(0, 1500, rng), draw(1, 600, rng)
        found.append(frechet_infinity(Pair(drawn, moments(drawn), real, moments(real))))
    assert check_coverage(found, TRUTH) == pytest.approx(1, abs=0.18)


def kernel_mean(first, second, dim):
    """E (x y / D + 1)³ of Gaussians with these means and unit covariances, from the moments of x y."""
    a, p, q = first @ second, first @ first, second @ second
    squares = a**2 + p + q + dim
    cubes = a**3 + 3 * a * q + 3 * a * (p + dim + 2)
    return 1 + 3 * a / dim + 3 * squares / dim**2 + cubes / dim**3


def test_intervals_of_kid_hold_what_they_promise(monkeypatch):
    """Of two Gaussians of known distance, and of one with itself, where the jackknife's deviation is √2 too large."""
    monkeypatch.setattr(kernel_module, "KID_SUBSETS", 4)
    monkeypatch.setattr(kernel_module, "KID_SUBSET_SIZE", 100)
    rng, dim = np.random.default_rng(0), 8
    for shift, ratio in ((0.6, 1.0), (0.0, 2**0.5)):
        ours, theirs = np.full(dim, shift), np.zeros(dim)
        within = kernel_mean(ours, ours, dim) + kernel_mean(theirs, theirs, dim)
        found = [
            kernel_distance(*(torch.from_numpy(rng.normal(size=(100, dim)) + mean) for mean in (ours, theirs)))
            for _ in range(TRIALS)
        ]
        truth = within - 2 * kernel_mean(ours, theirs, dim)
        assert check_coverage(found, truth) == pytest.approx(ratio, rel=0.18)


def test_intervals_of_mind_hold_what_they_promise(monkeypatch):
    """Of Gaussians shifted and scaled; the shift has another direction each time, as the projections are the same."""
    monkeypatch.setattr(monge_module, "MIND_PROJECTIONS", 100)
    rng, found, dim = np.random.default_rng(0), [], 4
    for _ in range(TRIALS):
        direction = rng.normal(size=dim)
        shift = 2 * direction / np.linalg.norm(direction)
        ours, theirs = (torch.from_numpy(rng.normal(size=(400, dim))).float() for _ in range(2))
        found.append(monge_distance(1.5 * ours + torch.from_numpy(shift).float(), theirs, torch.device("cpu")))
    assert check_coverage(found, 3 * 2**2 + 3 * dim * 0.5**2) == pytest.approx(1, abs=0.18)


def test_every_distance_has_an_interval_where_pictures_allow_one():
    """The one of spatial features is theirs, by the same rule as FID's; too few pictures have none."""
    rng = np.random.default_rng(0)
    real, drawn = (
        {"pooled": draw(which, 60, rng).float(), "spatial": draw(1 - which, 60, rng).float()} for which in (0, 1)
    )
    origin = FeaturesOrigin(name="x", dim=DIM, weights="none", sha256="0")
    network = SimpleNamespace(protocol="p", origin=origin, remarks=(), metric=lambda name: name)
    device = torch.device("cpu")
    found = {one.metric: one for one in measure(set_of(drawn), Reference(set_of(real)), network, device)}
    assert all(one.interval is not None and one.interval_of for one in found.values()) and len(found) == 7
    pair = Pair(drawn["spatial"], moments(drawn["spatial"]), real["spatial"], moments(real["spatial"]))
    assert found["spatial_frechet"].value == pytest.approx(frechet(pair)["value"])
    assert found["spatial_frechet"].interval == pytest.approx(frechet(pair)["interval"])
    known = Reference(None, moments(real["pooled"]), moments(real["spatial"]))
    known = {one.metric: one for one in measure(set_of(drawn), known, network, device)}
    for metric in ("frechet", "frechet_infinity", "spatial_frechet"):  # moments have no error of their own
        widths = [np.diff(one[metric].interval)[0] for one in (known, found)]
        assert known[metric].value == pytest.approx(found[metric].value) and widths[0] < widths[1]
    few = {name: column[:DIM] for name, column in drawn.items()}
    assert measure(set_of(few), Reference(set_of(few)), network, device)[0].interval is None


def set_of(columns):
    return FeatureSet(Chunks([columns]))
