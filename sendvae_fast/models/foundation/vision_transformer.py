"""Vision transformers as foundation models: timm's networks with timm's weight files or those of the original releases.

The releases that are read: DINOv2 and DINOv3 (bare), MAE (under ``model``), I-JEPA (under ``encoder``, each name behind
``module.``), OpenAI's CLIP (``visual.*`` beside the text tower, or the image tower alone). timm's own converters rename
the weights; another model's weights, which they would convert silently, are refused here.

The steps from name and path to features: `recipe_of`, `_read`, `_create`, `_load`.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.backbone import Backbone
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.foundation.recipes import Recipe, recipe_of
from sendvae_fast.models.weights import load_weights, part_of_checkpoint, read_weights

_WRAPPERS = ("model", "state_dict", "encoder")
_PATCHES, _CLIP_PATCHES = "patch_embed.proj.weight", "conv1.weight"
# Heads, and what MAE's whole checkpoints and masked training have beside the encoder.
_UNUSED = ("head.", "decoder_", "mask_token")


class TransformerTokens(nn.Module):
    """The patch tokens of a timm vision transformer after its last block."""

    def __init__(self, model: VisionTransformer | Eva, final_norm: bool):
        super().__init__()
        self.model = model
        self.final_norm = final_norm

    def forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = dict(indices=1, norm=self.final_norm, output_fmt="NLC", intermediates_only=True)
        model: Any = self.model  # its result has another type for every option
        return model.forward_intermediates(x, **options)[0]


def load_transformer(config: FoundationConfig) -> Backbone:
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
        state = _read(config.weights, recipe.weight_files)
        if _has_dinov3_biases(state):
            arguments["qkv_bias"] = True
    model = _create(recipe, **arguments)
    patch_size = model.patch_embed.patch_size[0]
    if image_size % patch_size:
        raise UserError(
            f"foundation image_size={image_size} does not divide into {config.name}'s patches: choose a multiple of "
            f"{patch_size}"
        )
    if state is not None and config.weights is not None:
        _load(model, state, config.weights)
    tokens = TransformerTokens(model, recipe.final_norm)
    return Backbone(tokens, image_size, image_size // patch_size, model.num_features, recipe.preprocessing)


def _read(path: str | Path, weight_files: str) -> dict[str, Tensor]:
    """A vision transformer's weights out of a local file, without wrappers and prefixes.

    Raises UserError for a file without one, which names `weight_files`.
    """
    content = read_weights(path)
    state = part_of_checkpoint(content, _PATCHES, _WRAPPERS)
    if not state:
        image_tower = part_of_checkpoint(content, _CLIP_PATCHES, _WRAPPERS)
        state = {f"visual.{key}": value for key, value in image_tower.items()}  # timm knows CLIP by this prefix
    if not state:
        raise UserError(
            f"{path} holds no vision transformer of timm's or an original release's layout (files of transformers are "
            f"not read): give {weight_files}"
        )
    return state


def _create(recipe: Recipe, **arguments: Any) -> Any:
    """The timm model without classifier, a VisionTransformer or Eva with random weights.

    It is made for one image size, so that rotary positions are computed once.
    """
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


def _load(model: Any, state: dict[str, Tensor], path: str | Path) -> None:
    """Load what `_read` gave into a timm network, learned positions resampled to its image size.

    Raises UserError in one line unless every weight is there, fits and is finite.
    """
    patches = state[_PATCHES if _PATCHES in state else f"visual.{_CLIP_PATCHES}"]
    size = model.patch_embed.patch_size[0]
    if isinstance(patches, Tensor) and patches.ndim == 4 and patches.shape[-1] != size:
        raise UserError(
            f"{path} has patches of {patches.shape[-1]} px, {_name(model)} has {size}: these are another model's "
            "weights"
        )
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints a line per key that DINOv3 lacks
            # In float32 first: positions are resampled in the type of the file, and CLIP's is half precision.
            converted = convert({key: value.float() for key, value in state.items()}, model)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not fit {_name(model)}: its positions or patches are of another shape. It is broken or holds "
            "another model's weights"
        ) from error
    load_weights(model, {key: value for key, value in converted.items() if not key.startswith(_UNUSED)}, path)
    periods = state.get("rope_embed.periods")
    if periods is not None:
        # DINOv3's release holds its rotation periods rounded to bfloat16; timm computes them anew and exactly.
        own, found = model.rope.periods, periods.float()
        if found.shape != own.shape or not (found > 0).all() or not found.isfinite().all():
            raise UserError(f"{path}: rope_embed.periods is not {len(own)} numbers above 0: fetch the file again")
        own.copy_(found)
        model.rope.pos_embed_cached.copy_(model.rope.get_embed(model.rope.feat_shape))


def _has_dinov3_biases(state: dict[str, Tensor]) -> bool:
    """Whether a DINOv3 file has biases of queries and values, as the original release does and timm's files do not."""
    return "storage_tokens" in state and "blocks.0.attn.qkv.bias" in state


def _name(model: Any) -> str:
    return model.pretrained_cfg.get("architecture", type(model).__name__)
