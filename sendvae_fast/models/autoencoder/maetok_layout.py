"""MAETok as its authors publish it: a folder of ``config.json`` and ``model.safetensors``, or their checkpoint's file.

The names of weights are those of `MAETok`. What is passed over: the encoder's mask token and every network beside
encoder and decoder, which only training has; the decoder's patch embedding, and its learned positions beside rotary
ones, which its authors' network carries and never uses; rotary places, which are a function of the sizes.

The authors' other tokenizers (SoftVQ, VQ, KL) have the same transformers and something between them: they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.maetok import MAETokConfig
from sendvae_fast.models.latent_statistics import LatentStatistics, statistics_of_numbers
from sendvae_fast.models.weights import part_of_checkpoint
from sendvae_fast.reading import NotOfItsKind

MARK = "codebook_embed_dim"
"""An entry of their config.json, and of no other's that is read here."""
WEIGHTS_FILE = "model.safetensors"

_FIRST_WEIGHT = "encoder.latent_tokens"
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_UNUSED = ("encoder.mask_token", "encoder.freqs_t_", "decoder.freqs_t_", "decoder.model.patch_embed.")
_HEAD_WIDTH = 64
"""Of DINOv2's transformers, whatever their size. The shapes of weights do not tell it."""


def maetok_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a tokenizer of theirs in a file's content, without wrapper and prefix; empty without one."""
    return part_of_checkpoint(dict(content), _FIRST_WEIGHT, ("model", "state_dict", "ema"))


def from_maetok(state: dict[str, Tensor], source: str) -> tuple[MAETokConfig, dict[str, Tensor]]:
    """Sizes and our state dict of a published one, see `maetok_state`. `UserError` where it is no MAETok."""

    def size(key: str, dim: int, ndim: int) -> int:
        if getattr(state.get(key), "ndim", None) != ndim:
            raise UserError(f"{source} is no MAETok with vision transformers: it lacks {key} of {ndim} dims")
        return state[key].shape[dim]

    channels = size("post_quant_conv.weight", 1, 2)
    if any(key.startswith("quantize.") for key in state) or size("quant_conv.weight", 0, 2) != channels:
        raise UserError(
            f"{source} is a tokenizer of MAETok's authors that quantises or draws its latents (SoftVQ, VQ, KL): only "
            "MAETok itself is read"
        )
    if any("adaLN_modulation" in key for key in state):
        raise UserError(f"{source} has a MoVQ decoder, which is modulated by its latents: only a plain one is read")
    patch = size("encoder.model.patch_embed.proj.weight", 2, 4)
    rope = "encoder.freqs" in state
    sizes: dict[str, int] = {}
    for part in ("encoder", "decoder"):
        width, depth = size(f"{part}.latent_pos_embed", 2, 3), 0
        while f"{part}.model.blocks.{depth}.attn.qkv.weight" in state:
            depth += 1
        sizes |= {f"{part}_width": width, f"{part}_depth": depth, f"{part}_heads": width // _HEAD_WIDTH}
    config = MAETokConfig(
        image_size=math.isqrt(size("encoder.model.pos_embed", 1, 3)) * patch,
        patch_size=patch,
        num_latent_tokens=size(_FIRST_WEIGHT, 1, 3),
        latent_channels=channels,
        **sizes,
        rope=rope,
        decoder_class_token="decoder.model.cls_token" in state,
    )
    unused = (*_UNUSED, *(("decoder.model.pos_embed",) if rope else ()))
    own = {key: value for key, value in state.items() if key.startswith(_PARTS) and not key.startswith(unused)}
    return config, own


def maetok_statistics(entries: Mapping[str, Any], channels: int, origin: str) -> LatentStatistics | None:
    """The statistics in a config.json of theirs: one mean and one deviation of all channels. None without.

    Raises NotOfItsKind, in words that follow the file's name, where they are no numbers.
    """
    if "vq_mean" not in entries or "vq_std" not in entries:
        return None
    mean, std = entries["vq_mean"], entries["vq_std"]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (mean, std)):
        raise NotOfItsKind(f"vq_mean and vq_std are {mean!r:.40} and {std!r:.40} and should be numbers")
    return statistics_of_numbers(mean, std, channels, origin)
