"""The pictures of the study, and how generated ones are measured: by a network that nothing was aligned with.

Shape letters: n pictures, D features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.evidence.study import Runs
from sendvae_fast.compare.pictures import split_photographs
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.scenes.scene import CLASS_NAMES
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.evaluation.distribution_metrics import Moments, Pair, frechet
from sendvae_fast.evaluation.extraction import FeatureSet, extract
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.evaluation.feature_networks import load_features
from sendvae_fast.evaluation.features import FeatureNetwork, FoundationFeatures
from sendvae_fast.evaluation.frechet import FeatureStatistics, frechet_distance
from sendvae_fast.evaluation.neighbours import precision_recall
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.models.foundation.demo_vit import DemoTokens
from sendvae_fast.train.demo_foundation import normalise

BATCH_SIZE = 200
NEAREST_BLOCK = 500
"""Rows of distances held at once."""
TRAIN_SEED, HELD_OUT_SEED = 10, 11
"""Of the rendered scenes."""


def prepare_pictures(runs: Runs, photographs: str | None) -> None:
    """Render the scenes, or divide the user's photographs into the two parts."""
    scale = runs.scale
    if scale.num_train is not None and scale.num_held_out is not None:
        synth_scenes(runs.train, scale.num_train, scale.image_size, TRAIN_SEED, num_workers=1)
        synth_scenes(runs.held_out, scale.num_held_out, scale.image_size, HELD_OUT_SEED, num_workers=1)
    elif not runs.held_out.is_file():
        split_photographs(Catalog.open(photographs or ""), runs.train, runs.held_out)


@dataclass
class Judge:
    """The network that compares pictures, and what it makes of the real ones."""

    network: FeatureNetwork
    train: CatalogPictures
    held_out: CatalogPictures
    folder: Path
    """Where the real pictures' features are kept."""

    @classmethod
    def open(cls, runs: Runs, features: FeaturesConfig, device: torch.device) -> Judge:
        """The study's own network where the scale has one, else the one that the user names."""
        weights = runs.scale.judge
        network = load_features(features, device) if weights is None else FoundationFeatures("demo", weights).to(device)
        size = runs.scale.image_size
        train, held_out = (CatalogPictures(Catalog.open(part), size, 1) for part in (runs.train, runs.held_out))
        return cls(network.eval(), train, held_out, runs.root / "features")

    @cached_property
    def train_features(self) -> Tensor:
        """Of the pictures that were trained on, [n, D]."""
        return self._extract(self.train).pooled

    @cached_property
    def held_out_features(self) -> Tensor:
        """Of the held-out pictures, [n, D]."""
        return self._extract(self.held_out).pooled

    def _extract(self, pictures: CatalogPictures) -> FeatureSet:
        return extract(pictures, self.network, BATCH_SIZE, folder=self.folder)

    @torch.no_grad()
    def features(self, images: Iterable[Tensor]) -> Tensor:
        """Of uint8 batches [B, 3, S, S]: [n, D] on the CPU."""
        device = next(self.network.parameters()).device
        return torch.cat([self.network(batch.to(device)).pooled.float().cpu() for batch in images])

    @torch.no_grad()
    def class_accuracy(self, images: Iterable[Tensor], labels: Tensor) -> float | None:
        """Share of pictures of scenes that are of the class that was asked for; None where the judge tells none.

        labels: classes of the training pictures' catalog, whose order is not that of the judge's.
        """
        tokens = self.network.foundation.tokens if isinstance(self.network, FoundationFeatures) else None
        if not isinstance(tokens, DemoTokens) or set(self.train.catalog.class_names) != set(CLASS_NAMES):
            return None
        device = next(self.network.parameters()).device
        logits = torch.cat([tokens.model(normalise(batch.to(device))).cpu() for batch in images])
        of_catalog = torch.tensor([CLASS_NAMES.index(name) for name in self.train.catalog.class_names])
        return float((logits[:, of_catalog].argmax(dim=1) == labels.cpu()).float().mean())

    def compare(self, features: Tensor, decoded: Tensor | None = None) -> dict[str, Any]:
        """The distances of pictures' features [n, D] from the held-out pictures', and what tells memorised pictures.

        decoded: features of the held-out pictures' latents, decoded; the distance from them is the generator's alone.
        """
        reference = self.held_out_features
        ours, theirs = moments(features), moments(reference)
        found = frechet(Pair(features, ours, reference, theirs))
        precision, recall = precision_recall(features, reference)
        from_decoded = {} if decoded is None else {"frechet_from_decoded": distance(ours, moments(decoded))}
        return {
            "frechet": found["value"], "frechet_interval": found.get("interval"),
            "kid": kernel_distance(features, reference), "precision": precision, "recall": recall, **from_decoded,
            **self._nearest(features),
        }  # fmt: skip

    def _nearest(self, features: Tensor) -> dict[str, float]:
        """Whether pictures are nearer to those trained on than to as many held-out ones: by chance half of them are."""
        num = min(len(self.train_features), len(self.held_out_features))
        seen, unseen = (side[spread(len(side), num)] for side in (self.train_features, self.held_out_features))
        nearer, ratios = [], []
        for part in features.split(NEAREST_BLOCK):
            to_seen, to_unseen = (torch.cdist(part, side).amin(dim=1) for side in (seen, unseen))
            nearer.append((to_seen < to_unseen).float())
            ratios.append(to_seen / to_unseen.clamp(min=1e-12))
        return {
            "nearer_to_train": float(torch.cat(nearer).mean()),
            "nearest_ratio": float(torch.cat(ratios).median()),
        }

    def real_floor(self, num: int) -> dict[str, Any]:
        """What as many real pictures of the training set score against the held-out ones."""
        features = self.train_features[spread(len(self.train_features), num)]
        return {"frechet": distance(moments(features), moments(self.held_out_features)),
                "kid": kernel_distance(features, self.held_out_features)}  # fmt: skip


def spread(total: int, num: int) -> Tensor:
    """At most `num` of `total` ids, from all over them: catalogs are in the order of classes."""
    return torch.linspace(0, total - 1, min(num, total)).long()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID of whole sets [n, D] and [m, D]: the unbiased squared MMD with the kernel (x y / D + 1)³.

    `distribution_metrics.kernel_distance` means it over a hundred subsets, at a hundred times the cost.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_diagonal(a: Tensor) -> Tensor:
        own = kernel(a, a)
        return (own.sum() - own.trace()) / (len(a) * (len(a) - 1))

    return float(without_diagonal(x) + without_diagonal(y) - 2 * kernel(x, y).mean())


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features [n, D]."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return Moments.of(statistics)


def distance(ours: Moments, theirs: Moments) -> float:
    """The Fréchet distance of two sets."""
    return frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
