"""Fréchet distance between the features of two sets of pictures (FID, when the features are Inception's).

Shape letters: B batch, D features.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.files import staged
from sendvae_fast.reading import NotOfItsKind, reading_zip

CHUNK = 4096
"""Feature vectors in float64 at once."""


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors, in float64 on the CPU.

    Batches and ranks are joined by the pairwise update of Chan, Golub and LeVeque (1979), which keeps its precision
    where E[x²] - E[x]² would cancel.
    """

    def __init__(self, dim: int) -> None:
        self.num = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)  # [D]
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # [D, D], sum of (x - mean)(x - mean)ᵀ

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [D, D], as np.cov. Raises UserError with fewer than two vectors."""
        if self.num < 2:
            raise UserError(f"a covariance needs at least 2 pictures, not {self.num}; give more")
        return self._scatter / (self.num - 1)

    def update(self, features: Tensor) -> None:
        """features [B, D], any float dtype and device. Raises UserError if one is not finite."""
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise UserError("features are not finite: pictures or the feature network are broken (NaN weights?)")
        if len(features) == 0:
            return
        mean = features.mean(dim=0)
        centred = features - mean
        self._join(len(features), mean, centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        """Take in the vectors that `other` has seen."""
        self._join(other.num, other.mean, other._scatter)

    def all_reduce(self, distributed: Distributed) -> None:
        """Join the statistics of all ranks; every rank calls it and then has them all."""
        own_num = self.num
        total = distributed.all_reduce_sum(torch.tensor(float(own_num), dtype=torch.float64))
        if total == 0:
            return
        mean = distributed.all_reduce_sum(self.mean * own_num) / total
        shift = self.mean - mean
        self._scatter = distributed.all_reduce_sum(self._scatter + own_num * torch.outer(shift, shift))
        self.num, self.mean = int(total), mean

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz with `mu` and `sigma`, as those of pytorch-fid, torch-fidelity and ADM, and `num`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Into an open file: to a name without .npz np.savez appends it.
        with staged(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy(), num=self.num)

    def _join(self, num: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.num + num
        if total == 0:
            return
        shift = mean - self.mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.num * num / total)
        self.mean = self.mean + shift * (num / total)
        self.num = total


def load_moments(path: str | os.PathLike[str], suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(mean [D], covariance [D, D]) float64 from the keys `mu` and `sigma` of an npz, or those with a suffix.

    ADM's reference files have ``_s`` for the spatial features of sFID. Raises UserError if it has no such keys.
    """
    with reading_zip(path, "give an npz with `mu` and `sigma`"), np.load(path, allow_pickle=False) as archive:
        mu, sigma = (archive[f"{key}{suffix}"].astype(np.float64) for key in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise NotOfItsKind(f"mu is {list(mu.shape)} and sigma {list(sigma.shape)}, not [D] and [D, D]")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise NotOfItsKind("mu or sigma is not finite")
    return mu, sigma


def feature_statistics(extract: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> FeatureStatistics:
    """Statistics of `extract(images) -> [B, D]` over batches of pictures. Raises UserError if there is no batch."""
    statistics = None
    for images in batches:
        features = extract(images)
        if statistics is None:
            statistics = FeatureStatistics(features.shape[1])
        statistics.update(features)
    if statistics is None:
        raise UserError("no pictures to take features of; is the folder empty?")
    return statistics


def frechet_distance(
    mu1: np.ndarray | Tensor, sigma1: np.ndarray | Tensor, mu2: np.ndarray | Tensor, sigma2: np.ndarray | Tensor
) -> float:
    """|mu1 - mu2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½), the squared 2-Wasserstein distance of two Gaussians.

    mu [D], sigma [D, D].

    tr (Σ1 Σ2)^½ = tr (Σ1^½ Σ2 Σ1^½)^½, whose argument is symmetric and positive: its eigenvalues are real and need
    neither scipy's matrix square root nor the small multiple of the identity that the reference code adds where Σ is
    singular (fewer pictures than features). Rounding below zero is cut off.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(value, dtype=torch.float64) for value in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise UserError(f"features of {len(mu1)} and {len(mu2)} dimensions have no distance; use one feature network")
    root = _square_root(sigma1)
    product_eigenvalues = torch.linalg.eigvalsh(root @ sigma2 @ root)
    trace = sigma1.trace() + sigma2.trace() - 2 * product_eigenvalues.clamp(min=0).sqrt().sum()
    return max(float((mu1 - mu2).square().sum() + trace), 0.0)


def influence(x: Tensor, mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """How much each vector of a set moves the set's Fréchet distance to another one, times the size of the set.

    2 (m - m') (x - m) + (x - m)ᵀ (I - T) (x - m) - tr((I - T) Σ), T = Σ'^½ (Σ'^½ Σ Σ'^½)^-½ Σ'^½, the derivative of the
    distance in the direction of x. Its variance over n vectors, divided by n, is the distance's to first order (the
    delta method); it says nothing of the bias, which falls as 1 / n.

    Args:
        x: [N, D], the set.
        mean: [D], of x.
        covariance: [D, D], of x, of full rank.
        other_mean: [D], of the other set.
        other_covariance: [D, D], of the other set.

    Returns:
        float64 [N], on the CPU.
    """
    root = _square_root(other_covariance)
    eigenvalues, axes = torch.linalg.eigh(root @ covariance @ root)
    kept = eigenvalues > eigenvalues[-1] * len(mean) * torch.finfo(torch.float64).eps
    half = root @ axes[:, kept] * eigenvalues[kept].rsqrt().sqrt()  # T = half halfᵀ
    curvature = torch.eye(len(mean), dtype=torch.float64) - half @ half.T
    values = []
    for part in x.split(CHUNK):
        centred = part.double().cpu() - mean
        values.append(2 * centred @ (mean - other_mean) + (centred @ curvature * centred).sum(dim=1))
    return torch.cat(values) - (curvature * covariance).sum()


def _square_root(covariance: Tensor) -> Tensor:
    """Σ^½, symmetric [D, D]."""
    eigenvalues, axes = torch.linalg.eigh(covariance)
    return axes * eigenvalues.clamp(min=0).sqrt() @ axes.T
