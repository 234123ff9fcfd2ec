"""Published weight files of vision transformers, in the layouts of their releases, as timm's networks want them.

Read are timm's files and the original releases: DINOv2 and DINOv3 (bare), MAE (under ``model``), I-JEPA (under
``encoder``, each name behind ``module.``), OpenAI's CLIP (``visual.*`` beside the text tower, or the image tower
alone). timm's own converters rename; what they would do silently to another model's weights is refused here.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.weights import load_weights, part_of_checkpoint, read_weights

_WRAPPERS = ("model", "state_dict", "encoder")
_PATCHES, _CLIP_PATCHES = "patch_embed.proj.weight", "conv1.weight"
# Heads, and what MAE's whole checkpoints and masked training have beside the encoder.
_UNUSED = ("head.", "decoder_", "mask_token")


def read_transformer(path: str | Path, weight_files: str) -> dict[str, Tensor]:
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


def load_transformer(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load what `read_transformer` gave into a timm network, learned positions resampled to its image size.

    Raises UserError in one line unless every weight is there, fits and is finite.
    """
    patches = state.get(_PATCHES, state.get(f"visual.{_CLIP_PATCHES}"))
    size = model.patch_embed.patch_size[0]
    if patches.ndim == 4 and patches.shape[-1] != size:
        raise UserError(
            f"{path} has patches of {patches.shape[-1]} px, {_name(model)} has {size}: these are another model's "
            "weights"
        )
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints a line per key that DINOv3 lacks
            # In float32 first: positions are resampled in the type of the file, and CLIP's is half precision.
            converted = convert({key: value.float() for key, value in state.items()}, model)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not fit {_name(model)}: its positions or patches are of another shape. It is broken or holds "
            "another model's weights"
        ) from error
    load_weights(model, {key: value for key, value in converted.items() if not key.startswith(_UNUSED)}, path)
    periods = state.get("rope_embed.periods")
    if periods is not None:
        # DINOv3's release holds its rotation periods rounded to bfloat16; timm computes them anew and exactly.
        model.rope.periods.copy_(periods)
        model.rope.pos_embed_cached.copy_(model.rope.get_embed(model.rope.feat_shape))


def has_dinov3_biases(state: dict[str, Tensor]) -> bool:
    """Whether a DINOv3 file has biases of queries and values, as the original release does and timm's files do not."""
    return "storage_tokens" in state and "blocks.0.attn.qkv.bias" in state


def _name(model: nn.Module) -> str:
    return model.pretrained_cfg.get("architecture", type(model).__name__)
