"""How each foundation model is built, what input it wants and which of its features are taken.

`foundation` is the public side, `recipes` names the transformers and their sources,
`release_weights` reads their files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
import torchvision
from safetensors import safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.demo_vit import DemoViT
from sendvae_fast.models.foundation.recipes import Preprocessing, Recipe, recipe_of
from sendvae_fast.models.foundation.release_weights import has_dinov3_biases, load_transformer, read_transformer
from sendvae_fast.models.weights import load_weights, read_weights

if TYPE_CHECKING:
    from sendvae_fast.models.foundation.foundation import FoundationConfig

DEMO_WEIGHTS = Path(__file__).with_name("demo_vit.safetensors")
_SQUEEZENET_MIN_SIZE = 18  # one token after its last module
_DEMO_PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # x / 127.5 - 1


@dataclass(frozen=True)
class Backbone:
    """A feature network and the input it wants."""

    tokens: nn.Module
    """Normalised images [B, 3, image_size, image_size] to tokens [B, grid_size ** 2, dim]."""
    image_size: int
    grid_size: int
    dim: int
    preprocessing: Preprocessing


class TransformerTokens(nn.Module):
    """The patch tokens of a timm vision transformer after its last block."""

    def __init__(self, model: nn.Module, final_norm: bool):
        super().__init__()
        self.model = model
        self.final_norm = final_norm

    def forward(self, x: Tensor) -> Tensor:
        options = dict(indices=1, norm=self.final_norm, output_fmt="NLC", intermediates_only=True)
        return self.model.forward_intermediates(x, **options)[0]


class ConvTokens(nn.Module):
    """The positions of a convolutional feature map as tokens."""

    def __init__(self, features: nn.Sequential):
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(2).transpose(1, 2)


class DemoTokens(nn.Module):
    """Images [B, 3, S, S] to the tokens of a `DemoViT`."""

    def __init__(self, model: DemoViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.tokens(x)


def timm_transformer(config: FoundationConfig) -> Backbone:
    """A vision transformer by one of the field's names (`recipes.RECIPES`) or by its timm name."""
    recipe = recipe_of(config.name)
    if config.weights is None and not config.random_weights:
        raise UserError(
            f"foundation model {config.name} needs its weights: set the foundation's weights to a local file, "
            f"{recipe.weight_files}"
        )
    image_size = config.image_size or recipe.image_size
    if config.grid_size is not None:
        image_size = config.grid_size * _patch_size(recipe)
    arguments = {"img_size": image_size}
    state = None
    if config.weights is not None:
        state = read_transformer(config.weights, recipe.weight_files)
        if has_dinov3_biases(state):
            arguments["qkv_bias"] = True
    model = _create(recipe, **arguments)
    patch_size = model.patch_embed.patch_size[0]
    if image_size % patch_size:
        raise UserError(
            f"foundation image_size={image_size} does not divide into {config.name}'s patches: choose a multiple of "
            f"{patch_size}"
        )
    if state is not None:
        load_transformer(model, state, config.weights)
    tokens = TransformerTokens(model, recipe.final_norm)
    return Backbone(tokens, image_size, image_size // patch_size, model.num_features, recipe.preprocessing)


def demo(config: FoundationConfig) -> Backbone:
    """The package's own small ViT; the file's metadata holds its sizes (key ``config``, JSON)."""
    path = Path(config.weights or DEMO_WEIGHTS)
    if not path.is_file():
        raise UserError(f"the demo foundation model's weights {path} are missing: install sendvae_fast again")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "config" not in metadata:
        raise UserError(f"{path} is not a demo foundation model: it has no `config` in its metadata")
    model = DemoViT(**json.loads(metadata["config"]))
    if (config.image_size or model.img_size, config.grid_size or model.grid_size) != (model.img_size, model.grid_size):
        raise UserError(
            f"the demo foundation model sees images of {model.img_size} px as {model.grid_size} x {model.grid_size} "
            "tokens and nothing else: leave image_size and grid_size out"
        )
    if not config.random_weights:
        load_weights(model, read_weights(path), path)
    return Backbone(DemoTokens(model), model.img_size, model.grid_size, model.embed_dim, _DEMO_PREPROCESSING)


def squeezenet(config: FoundationConfig) -> Backbone:
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
    if image_size < _SQUEEZENET_MIN_SIZE:
        raise UserError(
            f"foundation image_size={image_size} is too small for squeezenet: give at least {_SQUEEZENET_MIN_SIZE}"
        )
    with torch.no_grad():
        _, dim, grid_size, _ = features.eval()(torch.zeros(1, 3, image_size, image_size)).shape
    return Backbone(ConvTokens(features), image_size, grid_size, dim, Preprocessing())


def _create(recipe: Recipe, **arguments: Any) -> nn.Module:
    """The timm model without classifier, at random. For one image size: rotary positions are then computed once."""
    arguments = {"num_classes": 0, "dynamic_img_size": False, **recipe.arguments, **arguments}
    try:
        model = timm.create_model(recipe.timm_name, pretrained=False, **arguments)
    except TypeError as error:
        raise UserError(f"{recipe.timm_name} takes no image size: choose a plain vision transformer") from error
    if not isinstance(model, VisionTransformer | Eva):
        raise UserError(f"{recipe.timm_name} is no plain vision transformer: choose one")
    return model


def _patch_size(recipe: Recipe) -> int:
    with torch.device("meta"):
        return _create(recipe).patch_embed.patch_size[0]


def _strip_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features' state dict out of a whole torchvision network's; as it is when it holds the features alone."""
    features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    return features or state
