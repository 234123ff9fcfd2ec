"""The demo's foundation model: a small vision transformer on a convolutional stem.

A stem of convolutions in place of one large patch embedding ("Early Convolutions Help Transformers See Better", Xiao et
al., 2021) lets a transformer learn from thousands of pictures rather than millions. Everything else is timm's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.backbone import Backbone
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.foundation.preprocessing import Preprocessing
from sendvae_fast.models.weights import load_weights, read_weights
from sendvae_fast.reading import reading

DEMO_WEIGHTS = Path(__file__).with_name("demo_vit.safetensors")
DEMO_WEIGHTS_32 = Path(__file__).with_name("demo_vit_32.safetensors")
"""Of pictures of 32 px: made by bench/evidence/networks.py, as is the judge."""
JUDGE_WEIGHTS = Path(__file__).with_name("scene_judge.safetensors")
"""Of a network of 32 px scenes that learnt their classes and attributes: what generated scenes are measured with."""
_PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # x / 127.5 - 1
STRIDE = 8
# (in, out, kernel): even kernels where the stride is 2 keep the map's cells centred on the patches.
STEM = ((3, 24, 4), (24, 48, 3), (48, 64, 4), (64, 64, 3), (64, 128, 4), (128, 128, 3))


class ConvStem(nn.Module):
    """Images [B, 3, S, S] to tokens [B, (S / 8)², embed_dim], row-major; stands where timm has its PatchEmbed."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: object) -> None:
        super().__init__()
        if patch_size != STRIDE or in_chans != 3:
            raise ValueError(f"the stem is built for patches of {STRIDE} and 3 channels, not {patch_size}, {in_chans}")
        self.grid_size = (img_size // STRIDE, img_size // STRIDE)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        plan = [*STEM, (STEM[-1][1], embed_dim, 3)]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width_in, width_out, kernel, 2 if kernel == 4 else 1, 1, bias=False),
                    nn.BatchNorm2d(width_out),
                    nn.ReLU(),
                )
                for width_in, width_out, kernel in plan
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


class DemoViT(nn.Module):
    """A timm ViT of small pictures on a `ConvStem`, with mean pooling and a class head.

    LayerScale starts the transformer blocks near zero, so that training begins as a convolutional network's and
    attention joins in later. There is no last norm: it would scale tokens of empty background to the size of the
    object's.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, num_classes: int, img_size: int = 64) -> None:
        super().__init__()
        self.vit: Any = timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=False,
            img_size=img_size,
            patch_size=STRIDE,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            global_pool="avg",
            init_values=0.01,
            embed_layer=ConvStem,
            class_token=False,
            final_norm=False,
        )
        self.img_size, self.embed_dim, self.grid_size = img_size, embed_dim, img_size // STRIDE

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [B, num_classes] of images [B, 3, S, S] in [-1, 1]."""
        return self.vit(images)

    def tokens(self, images: Tensor) -> Tensor:
        """Patch tokens [B, N, embed_dim] after the last block, each normalised to mean 0 and deviation 1."""
        return F.layer_norm(self.vit.forward_features(images), (self.embed_dim,))


class DemoTokens(nn.Module):
    """Images [B, 3, S, S] to the tokens of a `DemoViT`."""

    def __init__(self, model: DemoViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.tokens(x)


def load_demo_vit(config: FoundationConfig) -> Backbone:
    """The package's own small ViT; the file's metadata holds its sizes (key ``config``, JSON)."""
    path = Path(config.weights or (DEMO_WEIGHTS_32 if config.image_size == 32 else DEMO_WEIGHTS))
    if not path.is_file():
        raise UserError(f"the demo foundation model's weights {path} are missing: install sendvae_fast again")
    with reading(path, "install sendvae_fast again, or train it again"), safe_open(path, framework="pt") as file:
        sizes = json.loads((file.metadata() or {})["config"])
        model = DemoViT(**sizes)
    if (config.image_size or model.img_size, config.grid_size or model.grid_size) != (model.img_size, model.grid_size):
        raise UserError(
            f"the demo foundation model sees images of {model.img_size} px as {model.grid_size} x {model.grid_size} "
            "tokens and nothing else: leave image_size and grid_size out"
        )
    if not config.random_weights:
        load_weights(model, read_weights(path), path)
    return Backbone(DemoTokens(model), model.img_size, model.grid_size, model.embed_dim, _PREPROCESSING)
