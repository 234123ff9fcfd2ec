"""DINOv2's features as FD-DINOv2 takes them (Stein et al., 2023; layer6ai-labs/dgm-eval's models/dinov2.py).

Pictures are resized to 224 px bicubically with antialiasing in 8 bits, as Pillow does, and normalised by ImageNet's
statistics; the feature is the class token after the last LayerNorm. Published numbers are ViT-L/14's.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sendvae_fast.evaluation.features import FeatureNetwork, Features
from sendvae_fast.evaluation.result import FeaturesOrigin
from sendvae_fast.files import file_sha256
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.foundation.vision_transformer import TransformerTokens, load_transformer

INPUT_PX = 224


class DINOv2Features(FeatureNetwork):
    """The class token of DINOv2, float32 [B, D]. Raises UserError for a weight file that is missing or another's."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str) -> None:
        backbone = load_transformer(FoundationConfig(name=name, weights=weights, image_size=INPUT_PX))
        super().__init__(
            FeaturesOrigin(
                name=f"dinov2_{name[-1]}", dim=backbone.dim, weights=weights, sha256=file_sha256(Path(weights))
            ),
            protocol="fd-dinov2",
        )
        assert isinstance(backbone.tokens, TransformerTokens)
        self.network = backbone.tokens.model.eval().requires_grad_(False)
        for key in ("mean", "std"):
            values = torch.tensor(getattr(backbone.preprocessing, key)).reshape(1, 3, 1, 1)
            self.register_buffer(key, values, persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """The class tokens of uint8 images [B, 3, S, S]."""
        tokens = self.network.forward_features((resized_as_pillow(images) / 255 - self.mean) / self.std)
        return Features(tokens[:, 0].float())


def resized_as_pillow(images: Tensor, size: int = INPUT_PX) -> Tensor:
    """uint8 [B, 3, S, S] to float [B, 3, size, size] of whole levels, within two of Pillow's bicubic resizing.

    Pillow rounds and clamps to 8 bits after the columns are resized and again after the rows.
    """
    resized = images.float()
    for shape in ((images.shape[-2], size), (size, size)):
        resized = F.interpolate(resized, size=shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    return resized
