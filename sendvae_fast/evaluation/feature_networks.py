"""The feature network that settings name."""

from __future__ import annotations

import torch

from sendvae_fast.evaluation.dinov2 import DINOv2Features
from sendvae_fast.evaluation.feature_config import DINOV2, FeaturesConfig
from sendvae_fast.evaluation.features import FeatureNetwork, FoundationFeatures
from sendvae_fast.evaluation.inception import InceptionFeatures, Resizing


def load_features(config: FeaturesConfig, device: torch.device, resizing: Resizing = "adm") -> FeatureNetwork:
    """The network, on a device.

    Args:
        config: its name and weight file.
        device: where it is to work.
        resizing: Inception's, see `InceptionFeatures`.

    Raises:
        UserError: the file is not given, or not that network's.
    """
    config.check()
    if config.name == "inception" and config.weights is not None:
        return InceptionFeatures(config.weights, resizing).to(device)
    if config.name in DINOV2 and config.weights is not None:
        return DINOv2Features(config.name, config.weights).to(device)
    return FoundationFeatures(config.name, config.weights).to(device)
