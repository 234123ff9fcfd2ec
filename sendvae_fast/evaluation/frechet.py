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


def load_moments(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """(mu [D], sigma [D, D]) float64 from an npz with those keys. Raises UserError if it is not one."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            mu, sigma = archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path} holds no feature statistics ({error}); give an npz with `mu` and `sigma`") from error
    if sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu is {mu.shape} but sigma {sigma.shape}; give an npz of mean [D], covariance [D, D]")
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
    eigenvalues, axes = torch.linalg.eigh(sigma1)
    root = axes * eigenvalues.clamp(min=0).sqrt() @ axes.T  # Σ1^½
    product_eigenvalues = torch.linalg.eigvalsh(root @ sigma2 @ root)
    trace = sigma1.trace() + sigma2.trace() - 2 * product_eigenvalues.clamp(min=0).sqrt().sum()
    return max(float((mu1 - mu2).square().sum() + trace), 0.0)
