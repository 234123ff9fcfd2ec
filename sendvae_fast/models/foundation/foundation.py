"""Frozen foundation models: the targets of alignment and the features of evaluation.

Nothing is downloaded: a model is chosen by name and its weights are a local file. Preprocessing and the choice of
features follow REPA and, for DINOv3 and SigLIP, iREPA (`recipes` says how and why).

Shape letters: B batch, S image size, N patch tokens, D feature width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.backbone import Backbone
from sendvae_fast.models.foundation.demo_vit import load_demo_vit
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.foundation.squeezenet import load_squeezenet
from sendvae_fast.models.foundation.vision_transformer import load_transformer
from sendvae_fast.models.precision import cast_parameters
from sendvae_fast.ops.layout import MEMORY_FORMAT


class Foundation(nn.Module):
    """A frozen network from uint8 images [B, 3, S, S] to patch tokens [B, N, D].

    Tokens are in row-major order, without class or register tokens. It stays in evaluation mode and gives no
    gradient. Images of another size than `image_size` are resized.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, backbone: Backbone):
        super().__init__()
        self.name = name
        self.tokens = backbone.tokens.eval().requires_grad_(False)
        for part in self.tokens.modules():
            # A plain attribute, see `engine.blocks`.
            part.compiles = isinstance(part, ViTBlock | EvaBlock)  # pyright: ignore[reportArgumentType]
        self.image_size = backbone.image_size
        self.grid_size = backbone.grid_size
        self.dim = backbone.dim
        self.preprocessing = backbone.preprocessing
        for key in ("mean", "std"):
            values = torch.tensor(getattr(self.preprocessing, key))
            self.register_buffer(key, values.reshape(1, 3, 1, 1), persistent=False)
        self.dtype = torch.float32

    def compute_in(self, dtype: torch.dtype) -> Foundation:
        """Hold the weights in `dtype`, compute in it and give tokens of it; call it outside autocast."""
        cast_parameters(self.tokens, dtype)
        self.dtype = dtype
        return self

    def train(self, mode: bool = True) -> Foundation:
        """Frozen: part of a module that trains, it stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens [B, N, dim] of uint8 images [B, 3, S, S] (TypeError for another dtype)."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in 0..255, got {images.dtype}")
        # Normalising before or after resizing is the same: the weights of the resampling sum to one.
        x = (images.float() / 255 - self.mean) / self.std
        if x.shape[-2:] != (self.image_size, self.image_size):
            resampling: dict[str, Any] = {
                "mode": self.preprocessing.interpolation,
                "antialias": self.preprocessing.antialias,
            }
            x = F.interpolate(x, size=(self.image_size, self.image_size), **resampling)
        return self.tokens(x.to(self.dtype, memory_format=MEMORY_FORMAT))

    def pooled(self, images: Tensor) -> Tensor:
        """Mean of the patch tokens, [B, dim], of uint8 images [B, 3, S, S]."""
        return self(images).mean(dim=1)

    def check_grid(self, grid_size: int) -> None:
        """`UserError` unless the model gives `grid_size` x `grid_size` tokens, as the features to align do."""
        if grid_size != self.grid_size:
            raise UserError(
                f"foundation model {self.name} gives {self.grid_size} x {self.grid_size} patch tokens (images of "
                f"{self.image_size}) but the latents give {grid_size} x {grid_size}: set the foundation's "
                f"grid_size={grid_size}, or change the patch size on the latents"
            )


def load_foundation(config: FoundationConfig) -> Foundation:
    """Build the named model and load its local weights, on the CPU in float32.

    Raises `UserError` for an unknown name, a weight file that is not given, missing or of another network, and an image
    size that the model cannot take.
    """
    load = {"demo": load_demo_vit, "squeezenet": load_squeezenet}.get(config.name, load_transformer)
    return Foundation(config.name, load(config))
