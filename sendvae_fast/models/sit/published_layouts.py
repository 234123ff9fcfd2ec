"""State dicts of SiT, REPA, REPA-E, LightningDiT, DiT and MAETok's SiT: from and to ours, which is REPA's.

All have the same parameter names. They differ in four things.

- Time. REPA's, like ours, is the noise level; SiT's and LightningDiT's is one minus it, and their velocity points the
  other way. `reverse_time` goes from one to the other by changing weights, exactly but for rounding.
- SiT predicts a sigma beside every channel, which no sampler uses: that half of the last layer is dropped. A DiT's
  weights look the same, and are something else: that they are one has to be said.
- MAETok's, for a sequence of latents, embeds tokens by a linear layer under a name of its own, where ours has the same
  weights as a convolution of 1 x 1. Its time is REPA's.
- Entries beside the parameters: REPA-E's batch norm of latents, LightningDiT's rotary buffers, REPA's projectors.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.models.sit.sit import SiT, timestep_frequencies
from sendvae_fast.models.sit.sizes import NUM_HEADS, SiTConfig

_EMBEDDING, _EMBEDDING_OF_SEQUENCE = "x_embedder.proj", "x_embedder"
FIRST_WEIGHTS = tuple(f"{name}.weight" for name in (_EMBEDDING, _EMBEDDING_OF_SEQUENCE))
"""One of which every layout has."""
_OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
_TIME = "t_embedder.mlp.0.weight"
_BATCH_NORM, _ROPE = "bn.", "feat_rope."


def from_published(state: dict[str, Tensor], source: str, is_dit: bool = False) -> tuple[SiTConfig, dict[str, Tensor]]:
    """Sizes and our state dict of a published one, without its wrappers and prefixes.

    is_dit: it is DiT's.

    Latents' statistics, rotary buffers and all projectors but the first are passed over. Time is taken to be SiT's
    where sigma is learned, LightningDiT's where one of its parts is there, and else REPA's. `UserError` where it is no
    SiT.
    """
    state, is_sequence = _with_convolution(state)
    config = _config_of(state, source, is_sequence)
    own = {
        key: value for key, value in state.items()
        if key.startswith("projectors.0.") or not key.startswith((_BATCH_NORM, _ROPE, "projectors."))
    }  # fmt: skip
    has_sigma = len(state[_OUTPUT[1]]) == 2 * config.patch_size**2 * config.latent_channels
    if is_dit:
        if not has_sigma:
            raise UserError(f"{source} is no DiT: its last layer has no outputs for the variance")
        return dataclasses.replace(config, diffusion=True), own
    if has_sigma:
        own.update({key: _without_sigma(state[key], config) for key in _OUTPUT})
    return config, reverse_time(own) if has_sigma or _is_lightningdit(config) else own


def to_repa(sit: SiT, latent_mean: Tensor, latent_std: Tensor, batch_norm: bool) -> dict[str, Tensor]:
    """The state dict of REPA's SiT or, with the latents' statistics in its batch norm, of REPA-E's.

    `UserError` for a network with LightningDiT's parts.
    """
    _check_grid(sit)
    if sit.config.diffusion:
        raise UserError("the generator is a DiT, which none of REPA's checkpoints is: convert --to=generator")
    if _is_lightningdit(sit.config):
        raise UserError("the generator has parts of LightningDiT that REPA's SiT lacks: convert --to=lightningdit")
    state = dict(sit.state_dict())
    if batch_norm:
        state |= {
            "bn.running_mean": latent_mean, "bn.running_var": latent_std**2, "bn.num_batches_tracked": torch.tensor(0),
        }  # fmt: skip
    return state


def to_lightningdit(sit: SiT) -> dict[str, Tensor]:
    """The state dict of LightningDiT, which has no projector.

    `UserError` for a network with none of its parts: nothing would then tell which way its time runs.
    """
    _check_grid(sit)
    if not _is_lightningdit(sit.config):
        raise UserError("the generator has none of LightningDiT's parts: convert --to=repa or --to=repa-e")
    state = {key: value for key, value in sit.state_dict().items() if not key.startswith("projectors.")}
    if sit.rope is not None:
        for name in ("cos", "sin"):
            state[f"{_ROPE}freqs_{name}"] = getattr(sit.rope, name).repeat_interleave(2, dim=1)  # [N, head_dim]
    return reverse_time(state)


def _check_grid(sit: SiT) -> None:
    if sit.config.one_dimensional:
        raise UserError(
            "the generator is for latents that are a sequence, as no such checkpoint is: convert --to=generator"
        )


def reverse_time(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network ``-f(x, 1 - t)``, if `state` is that of ``f(x, t)``. Its own inverse.

    The time goes through cosines and sines of ``w t`` into a linear layer, and those of ``w - w t`` are sums of them,
    so only that layer changes, and the sign of the last.
    """
    w = timestep_frequencies().double()
    cos, sin = state[_TIME].double().chunk(2, dim=1)
    turned = torch.cat([cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()], dim=1)
    return {**state, _TIME: turned.to(state[_TIME].dtype), **{key: -state[key] for key in _OUTPUT}}


def _is_lightningdit(config: SiTConfig) -> bool:
    return config.swiglu or config.rms_norm or config.rope


def _without_sigma(value: Tensor, config: SiTConfig) -> Tensor:
    """The last layer's rows [P P 2C, ...] are by position, then channel: of every 2C the first C are the velocity."""
    channels = config.latent_channels
    return value.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1).contiguous()


def _with_convolution(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The state dict with a convolution as patch embedding; and whether it had a sequence's linear layer."""
    linear = state.get(f"{_EMBEDDING_OF_SEQUENCE}.weight")
    if linear is None or getattr(linear, "ndim", None) != 2:
        return state, False
    others = {key: value for key, value in state.items() if not key.startswith(f"{_EMBEDDING_OF_SEQUENCE}.")}
    own = {f"{_EMBEDDING}.weight": linear[:, :, None, None]}
    if (bias := state.get(f"{_EMBEDDING_OF_SEQUENCE}.bias")) is not None:
        own[f"{_EMBEDDING}.bias"] = bias
    return own | others, True


def _config_of(state: dict[str, Tensor], source: str, is_sequence: bool) -> SiTConfig:
    """Sizes and switches from names and shapes of weights; the number of heads may follow from the width."""

    def size(key: str, dim: int, ndim: int) -> int:
        if getattr(state.get(key), "ndim", None) != ndim:
            raise UserError(f"{source} is no SiT in the layout of REPA or LightningDiT: it lacks {key} of {ndim} dims")
        return state[key].shape[dim]

    width, channels, patch_size = (size(f"{_EMBEDDING}.weight", dim, 4) for dim in (0, 1, 2))
    for key, ndim in ((_OUTPUT[0], 2), (_OUTPUT[1], 1), (_TIME, 2)):
        size(key, 0, ndim)
    depth = 0
    while f"blocks.{depth}.attn.qkv.weight" in state:
        depth += 1
    repa, tokens = "projectors.0.0.weight" in state, size("pos_embed", 1, 3)
    return SiTConfig(
        latent_size=tokens if is_sequence else math.isqrt(tokens) * patch_size,
        one_dimensional=is_sequence,
        latent_channels=channels,
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=_num_heads(state, width, source),
        num_classes=size("y_embedder.embedding_table.weight", 0, 2) - 1,
        repa_dim=size("projectors.0.4.weight", 0, 2) if repa else None,
        repa_block=min(SiTConfig.repa_block, depth),  # nothing in the weights tells it; REPA's
        projector_width=size("projectors.0.0.weight", 0, 2) if repa else SiTConfig.projector_width,
        swiglu="blocks.0.mlp.w12.weight" in state,
        rms_norm="blocks.0.norm1.weight" in state,
        rope=f"{_ROPE}freqs_cos" in state,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
    )


def _num_heads(state: dict[str, Tensor], width: int, source: str) -> int:
    for key in (f"{_ROPE}freqs_cos", "blocks.0.attn.q_norm.weight"):
        if key in state:
            return width // state[key].shape[-1]
    if width not in NUM_HEADS:
        raise UserError(
            f"{source} has a SiT of width {width}, and its shapes do not tell the number of heads: only the widths of "
            f"published models ({', '.join(map(str, NUM_HEADS))}) can be read"
        )
    return NUM_HEADS[width]
