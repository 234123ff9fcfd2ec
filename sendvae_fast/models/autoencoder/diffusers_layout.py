"""The autoencoder in diffusers' layout: names of weights and fields of ``AutoencoderKL``'s config.json.

Where the two layouts differ: diffusers numbers the decoder's levels in the order they run, so the other way round, and
its attention has linear layers ([D, D]) where latent-diffusion has 1x1 convolutions ([D, D, 1, 1]). Older files
call these query, key, value and proj_attn.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.reading import NotOfItsKind, dataclass_of

_RENAMED = [
    (r"down\.(\d+)", r"down_blocks.\1"),
    (r"\.block\.(\d+)", r".resnets.\1"),
    (r"\.attn\.(\d+)", r".attentions.\1"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"nin_shortcut", "conv_shortcut"),
    (r"downsample\.conv", "downsamplers.0.conv"),
    (r"upsample\.conv", "upsamplers.0.conv"),
    (r"norm_out", "conv_norm_out"),
]
_RENAMED_IN_ATTENTION = [(r"\.([qkv])\.", r".to_\1."), (r"\.proj_out\.", ".to_out.0."), (r"\.norm\.", ".group_norm.")]
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_BLOCK = ("DownEncoderBlock2D", "UpDecoderBlock2D")
_ATTENTION_BLOCK = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
_ONLY_VALUES = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


def to_diffusers(state: dict[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """A state dict of `Autoencoder` (LDM layout) under diffusers' names and shapes; same bits."""
    return {
        _diffusers_name(key, config): value.flatten(1) if _is_attention(key) else value for key, value in state.items()
    }


def from_diffusers(state: dict[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`; attention may have its old names. Keys it does not know keep theirs."""
    with torch.device("meta"):
        own_names = {_diffusers_name(key, config): key for key in Autoencoder(config).state_dict()}
    renamed = {}
    for key, value in state.items():
        own = own_names.get(_new_attention_name(key), key)
        renamed[own] = value[:, :, None, None] if _is_attention(own) and value.ndim == 2 else value
    return renamed


def to_diffusers_config(config: AutoencoderConfig, latent_mean: Tensor, latent_std: Tensor) -> dict:
    """The config.json of `diffusers.AutoencoderKL.from_pretrained`. `UserError` for sizes that it cannot express."""
    if config.channel_multipliers[0] != 1:
        raise UserError(
            f"autoencoder channel_multipliers={list(config.channel_multipliers)} has no diffusers equivalent: there "
            "the first must be 1; convert --to=ldm or --to=sendvae instead"
        )
    attention = [config.has_attention(level) for level in range(config.num_levels)]
    return _ONLY_VALUES | {
        "block_out_channels": list(config.widths),
        "down_block_types": [(_ATTENTION_BLOCK if on else _BLOCK)[0] for on in attention],
        "up_block_types": [(_ATTENTION_BLOCK if on else _BLOCK)[1] for on in reversed(attention)],
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.num_groups,
        "mid_block_add_attention": config.mid_attention,
        "sample_size": config.nominal_resolution,
        # diffusers' pipelines apply both: z = latents * latents_std / scaling_factor + latents_mean.
        "scaling_factor": 1.0,
        "latents_mean": latent_mean.tolist(),
        "latents_std": latent_std.tolist(),
    }


def from_diffusers_config(entries: dict) -> AutoencoderConfig:
    """Sizes from the content of a diffusers config.json.

    Raises NotOfItsKind, in words that follow the file's name, where the network is not one that `Autoencoder` can be.
    """
    for name, value in _ONLY_VALUES.items():
        if entries.get(name, value) != value:
            raise NotOfItsKind(f"{name} is {entries[name]!r} and only {value!r} is supported")
    widths = [int(width) for width in entries["block_out_channels"]]
    num_levels = len(widths)
    down, up = list(entries["down_block_types"]), list(entries["up_block_types"])[::-1]
    if not widths or widths[0] < 1 or any(width % widths[0] for width in widths):
        raise NotOfItsKind(f"block_out_channels {widths} are not multiples of the first")
    pairs = list(zip(down, up, strict=False))
    if not len(down) == len(up) == num_levels or not {*pairs} <= {_BLOCK, _ATTENTION_BLOCK}:
        raise NotOfItsKind(f"down_block_types {down} and up_block_types {up[::-1]} are not those of an LDM autoencoder")
    nominal = AutoencoderConfig.nominal_resolution  # a name for levels, not what the weights were trained at
    sizes = dict(
        base_channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=entries.get("layers_per_block", 1),
        attention_resolutions=tuple(nominal >> i for i, pair in enumerate(pairs) if pair == _ATTENTION_BLOCK),
        latent_channels=entries["latent_channels"],
        num_groups=entries.get("norm_num_groups", 32),
        mid_attention=entries.get("mid_block_add_attention", True),
    )
    return dataclass_of(AutoencoderConfig, sizes)


def _is_attention(key: str) -> bool:
    """Whether an LDM name is one of attention's 1x1 convolution weights."""
    return re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", key) is not None


def _diffusers_name(key: str, config: AutoencoderConfig) -> str:
    rules = _RENAMED_IN_ATTENTION + _RENAMED if ".attn" in key else _RENAMED
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"up\.(\d+)", lambda match: f"up_blocks.{config.num_levels - 1 - int(match[1])}", key)


def _new_attention_name(key: str) -> str:
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", key
    )
