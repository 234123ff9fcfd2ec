"""torchvision's SqueezeNet-1.1 as a foundation model: small enough for a CPU, with weights that are easy to come by."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.backbone import Backbone
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.foundation.preprocessing import IMAGENET
from sendvae_fast.models.weights import load_weights, read_weights

_MIN_SIZE = 18  # one token after its last module


class ConvTokens(nn.Module):
    """The positions of a convolutional feature map as tokens."""

    def __init__(self, features: nn.Sequential):
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(2).transpose(1, 2)


def load_squeezenet(config: FoundationConfig) -> Backbone:
    """torchvision's SqueezeNet-1.1 up to a feature module; from its file or one of the features alone."""
    if config.weights is None and not config.random_weights:
        raise UserError(
            "foundation model squeezenet needs its weights: set the foundation's weights to a local file of "
            "torchvision's squeezenet1_1 (squeezenet1_1-b8a52dc0.pth) or of its features"
        )
    features = torchvision.models.squeezenet1_1(weights=None).features
    last = len(features) - 1 if config.layer is None else config.layer
    if not 0 <= last < len(features):
        raise UserError(f"foundation layer={last} does not exist in squeezenet: choose 0 to {len(features) - 1}")
    if config.weights is not None:
        load_weights(features, _strip_classifier(read_weights(config.weights)), config.weights)
    features = features[: last + 1]
    image_size = config.image_size or 224
    if config.grid_size is not None:
        # The first convolution is unpadded and the pools round up: this is the size that gives the grid.
        stride = 2 ** (1 + sum(isinstance(part, nn.MaxPool2d) for part in features))
        image_size = stride * config.grid_size + 2
    if image_size < _MIN_SIZE:
        raise UserError(f"foundation image_size={image_size} is too small for squeezenet: give at least {_MIN_SIZE}")
    with torch.no_grad():
        _, dim, grid_size, _ = features.eval()(torch.zeros(1, 3, image_size, image_size)).shape
    return Backbone(ConvTokens(features), image_size, grid_size, dim, IMAGENET)


def _strip_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features' state dict out of a whole torchvision network's; as it is when it holds the features alone."""
    features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    return features or state
