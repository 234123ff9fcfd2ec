import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.linalg
import torch
from time_limits import HANG_S
from torch_fidelity.metric_fid import fid_statistics_to_metric

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.frechet import FeatureStatistics, feature_statistics, frechet_distance, load_moments


def random_moments(dim, seed, num=None):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num or 4 * dim, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
    return features.mean(0), np.cov(features, rowvar=False)


def test_mean_shift_of_one_in_512_dimensions():
    zeros, eye = np.zeros(512), np.eye(512)
    assert frechet_distance(zeros, eye, zeros + 1, eye) == pytest.approx(512, abs=1e-6)


def test_diagonal_covariances():
    """Σ (m1 - m2)² + (s1 - s2)², s the deviations."""
    rng = np.random.default_rng(0)
    mu1, mu2, s1, s2 = rng.uniform(0.1, 2, size=(4, 50))
    expected = ((mu1 - mu2) ** 2 + (s1 - s2) ** 2).sum()
    assert frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num", [None, 20])
def test_agrees_with_scipy_and_torch_fidelity(num):
    """Of full rank, and of 20 pictures in 64 dimensions."""
    (mu1, sigma1), (mu2, sigma2) = random_moments(64, 1, num), random_moments(64, 2, num)
    ours = frechet_distance(mu1, sigma1, mu2, sigma2)
    theirs = fid_statistics_to_metric({"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}, verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    if num is None:
        root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
        assert ours == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric_zero_to_itself_and_needs_one_dimension():
    first, second = random_moments(64, 1, 20), random_moments(64, 2)
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), rel=1e-6)
    assert 0 <= frechet_distance(*second, *second) < 1e-6 * np.trace(second[1])
    with pytest.raises(UserError, match="64 and 3"):
        frechet_distance(*first, *random_moments(3, 0))


def offset_features(num=500, dim=12, seed=0):
    """Far from the origin, where E[x²] - E[x]² would lose its digits."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, dim)) + 1e6)


def test_streaming_equals_numpy():
    features = offset_features()
    batches = [features[:1], features[1:1], *features[1:].split(64)]
    statistics = feature_statistics(lambda batch: batch, batches)
    assert statistics.num == 500
    np.testing.assert_allclose(statistics.mean.numpy(), features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(features.numpy(), rowvar=False), atol=1e-8)


def test_merging_equals_one_stream():
    features = offset_features()
    whole, left, right = (FeatureStatistics(12) for _ in range(3))
    whole.update(features)
    left.update(features[:77])
    right.update(features[77:])
    left.merge(FeatureStatistics(12))
    left.merge(right)
    assert left.num == 500
    torch.testing.assert_close(left.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(left.covariance, whole.covariance, rtol=0, atol=1e-8)


class Meeting:
    """Two threads in the place of two ranks."""

    def __init__(self):
        self.barrier, self.tensors = threading.Barrier(2), {}

    def all_reduce_sum(self, tensor):
        self.tensors[threading.get_ident()] = tensor.clone()
        self.barrier.wait(timeout=HANG_S)
        tensor.copy_(sum(self.tensors.values()))
        self.barrier.wait(timeout=HANG_S)
        return tensor


def test_two_ranks_equal_one():
    features, meeting = offset_features(), Meeting()

    def of_rank(rows):
        statistics = FeatureStatistics(12)
        statistics.update(features[rows])
        statistics.all_reduce(meeting)
        return statistics

    with ThreadPoolExecutor(2) as ranks:
        both = list(ranks.map(of_rank, [slice(0, 77), slice(77, None)]))
    for statistics in both:
        assert statistics.num == 500
        np.testing.assert_allclose(statistics.mean.numpy(), features.numpy().mean(0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(features.numpy(), rowvar=False), atol=1e-8)


def test_moments_survive_the_disk(tmp_path):
    statistics = FeatureStatistics(12)
    statistics.update(offset_features().float())
    statistics.save(tmp_path / "new" / "reference.moments")
    mu, sigma = load_moments(tmp_path / "new" / "reference.moments")
    assert np.array_equal(mu, statistics.mean.numpy()) and np.array_equal(sigma, statistics.covariance.numpy())


def test_files_without_moments_are_named(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    (tmp_path / "text.npz").write_text("not an npz")
    for name in ("images.npz", "odd.npz", "text.npz", "absent.npz"):
        with pytest.raises(UserError, match=name):
            load_moments(tmp_path / name)


def test_broken_or_absent_features_are_named():
    statistics = FeatureStatistics(2)
    with pytest.raises(UserError, match="not finite"):
        statistics.update(torch.tensor([[1.0, torch.nan]]))
    statistics.update(torch.ones(1, 2))
    with pytest.raises(UserError, match="at least 2"):
        _ = statistics.covariance
    with pytest.raises(UserError, match="no pictures"):
        feature_statistics(lambda batch: batch, [])
