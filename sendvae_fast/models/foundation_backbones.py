"""How each foundation model is built, what input it wants and which of its features are taken.

`sendvae_fast.models.foundation` is the public side. Weights are local files; timm's own converters read the original
releases (DINOv2, DINOv3, I-JEPA, MAE) as well as timm's files, and resample learned positions to the image size.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
import torchvision
from safetensors import safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.demo_vit import DemoViT
from sendvae_fast.models.weights import load_weights, read_weights

if TYPE_CHECKING:
    from sendvae_fast.models.foundation import FoundationConfig

DEMO_WEIGHTS = Path(__file__).with_name("demo_vit.safetensors")
_SQUEEZENET_MIN_SIZE = 18  # one token after its last module
HALF = (0.5, 0.5, 0.5)  # as mean and standard deviation: x / 127.5 - 1


@dataclass(frozen=True)
class Backbone:
    """A feature network and the input it wants."""

    tokens: nn.Module
    """Normalised images [B, 3, image_size, image_size] to tokens [B, grid_size ** 2, dim]."""
    image_size: int
    grid_size: int
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """What a named model is in timm and what REPA or iREPA takes from it."""

    timm_name: str
    tag: str
    """timm's name for the weights: the file is ``model.safetensors`` of the hub's ``timm/<timm_name>.<tag>``."""
    image_size: int
    final_norm: bool = True
    """Whether the tokens pass the network's last LayerNorm. REPA takes MAE's and CLIP's without it."""
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD


_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
RECIPES = {
    **{f"dinov2-vit-{s}": Recipe(f"vit_{_SIZES[s]}_patch14_dinov2", "lvd142m", 224) for s in "sblg"},
    **{f"dinov3-vit-{s}": Recipe(f"vit_{_SIZES[s]}_patch16_dinov3", "lvd1689m", 256) for s in "sbl"},
    **{f"mae-vit-{s}": Recipe(f"vit_{_SIZES[s]}_patch16_224", "mae", 256, final_norm=False) for s in "bl"},
    # iREPA feeds SigLIP with ImageNet's mean and standard deviation, not its own 0.5.
    **{f"siglip-{s}": Recipe(f"vit_{_SIZES[s]}_patch16_siglip_256", "webli", 256) for s in "bl"},
    "clip-vit-l": Recipe(
        "vit_large_patch14_clip_quickgelu_224", "openai", 224, False, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    ),
    "ijepa-vit-h": Recipe("vit_huge_patch14_gap_224", "in1k_ijepa", 224),
}


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
    """A vision transformer by one of the field's names (`RECIPES`) or by its timm name."""
    recipe = RECIPES.get(config.name) or _generic_recipe(config.name)
    if config.weights is None and not config.random_weights:
        hub_name = f"timm/{recipe.timm_name}" + (f".{recipe.tag}" if recipe.tag else "")
        raise UserError(
            f"foundation model {config.name} needs its weights: set the foundation's weights to a local file, either "
            f"model.safetensors of {hub_name} or the original release's .pth"
        )
    return _transformer(recipe, {}, config, config.weights)


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
    return Backbone(DemoTokens(model), model.img_size, model.grid_size, model.embed_dim, HALF, HALF)


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
    return Backbone(ConvTokens(features), image_size, grid_size, dim, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _generic_recipe(name: str) -> Recipe:
    if not timm.is_model(name):
        known = ["demo", "squeezenet", *RECIPES]
        nearest = difflib.get_close_matches(name, known + timm.list_models("*vit*"), n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"unknown foundation model {name!r}: {hint}choose {', '.join(known)}, or a ViT that timm names")
    published = timm.get_pretrained_cfg(name)
    return Recipe(name, published.tag or "", published.input_size[-1], mean=published.mean, std=published.std)


def _transformer(recipe: Recipe, arguments: dict, config: FoundationConfig, weights: str | Path | None) -> Backbone:
    state = None if weights is None else read_weights(weights)
    image_size = config.image_size or recipe.image_size
    if config.grid_size is not None:
        image_size = config.grid_size * _patch_size(recipe, arguments)
    model = _create(recipe, {**arguments, "img_size": image_size})
    patch_size = model.patch_embed.patch_size[0]
    if image_size % patch_size:
        raise UserError(
            f"foundation image_size={image_size} does not divide into {config.name}'s patches: choose a multiple of "
            f"{patch_size}"
        )
    if state is not None:
        load_weights(model, _convert(state, model), weights)
    tokens = TransformerTokens(model, recipe.final_norm)
    return Backbone(tokens, image_size, image_size // patch_size, model.num_features, recipe.mean, recipe.std)


def _create(recipe: Recipe, arguments: dict) -> nn.Module:
    """The timm model without classifier, at random."""
    try:
        model = timm.create_model(recipe.timm_name, pretrained=False, **{**arguments, "num_classes": 0})
    except TypeError as error:
        raise UserError(f"{recipe.timm_name} takes no image size: choose a plain vision transformer") from error
    if not isinstance(model, VisionTransformer | Eva):
        raise UserError(f"{recipe.timm_name} is no plain vision transformer: choose one")
    return model


def _patch_size(recipe: Recipe, arguments: dict) -> int:
    with torch.device("meta"):
        return _create(recipe, arguments).patch_embed.patch_size[0]


def _convert(state: dict, model: nn.Module) -> dict[str, Tensor]:
    """Bring a published state dict to timm's layout and the model's image size, by timm's converter for its family."""
    with contextlib.redirect_stdout(io.StringIO()):  # timm prints a line per key that DINOv3 lacks
        state = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def _strip_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features' state dict out of a whole torchvision network's; as it is when it holds the features alone."""
    features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    return features or state
