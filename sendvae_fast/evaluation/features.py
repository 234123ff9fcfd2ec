"""Feature networks of evaluation: pictures to the vectors whose distributions are compared.

Shape letters: B batch, S picture size, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sendvae_fast.evaluation.feature_config import PACKAGED
from sendvae_fast.evaluation.result import FeaturesOrigin
from sendvae_fast.files import file_sha256
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS, JUDGE_WEIGHTS
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.foundation.foundation_config import FoundationConfig

_WEIGHTS = {"demo": DEMO_WEIGHTS, "judge": JUDGE_WEIGHTS}
"""Of the packaged networks."""


class Features(NamedTuple):
    """What a network says of a batch of pictures, float32."""

    pooled: Tensor
    """[B, D]."""
    spatial: Tensor | None = None
    """[B, 2023] of Inception: what sFID compares."""
    logits: Tensor | None = None
    """[B, 1008] of Inception, without the bias: what the Inception score takes."""


class FeatureNetwork(nn.Module, ABC):
    """A frozen network from uint8 pictures [B, 3, S, S] to `Features`, with a name that its metrics carry."""

    def __init__(
        self,
        origin: FeaturesOrigin,
        protocol: str,
        remarks: tuple[str, ...] = (),
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """names: the field's names of metrics with these features, by those that hold for any."""
        super().__init__()
        self.origin, self.protocol, self.remarks, self.names = origin, protocol, remarks, names

    def metric(self, name: str) -> str:
        """What a metric is called with this network's features: ``frechet`` becomes ``frechet_demo``."""
        return self.names.get(name, f"{name}_{self.origin.name}")

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Frozen: it stays in evaluation mode."""
        return super().train(False)

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images [B, 3, S, S]."""


class FoundationFeatures(FeatureNetwork):
    """The mean of a foundation model's patch tokens: compares this project's runs with each other alone."""

    def __init__(self, name: str, weights: str | None) -> None:
        file = Path(_WEIGHTS[name] if weights is None else weights)
        foundation = load_foundation(FoundationConfig(name="demo" if name in PACKAGED else name, weights=str(file)))
        own = FeaturesOrigin(
            name=name.replace("-vit-", "_").replace("-", "_"),
            dim=foundation.dim,
            weights=file.name if weights is None else str(file),
            sha256=file_sha256(file),
        )
        super().__init__(own, "mean of patch tokens")
        self.foundation = foundation

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Pooled tokens alone."""
        return Features(self.foundation.pooled(images).float())
