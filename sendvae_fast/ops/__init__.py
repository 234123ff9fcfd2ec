"""Fused operations and the random numbers they draw. See docs/design.md, "Op" and "Randomness"."""

from sendvae_fast.ops import philox
from sendvae_fast.ops.adaln import adaln, adaln_reference
from sendvae_fast.ops.adamw_ema import adamw_ema_, adamw_ema_reference_
from sendvae_fast.ops.attention.call import attention, attention_reference, available_attention, use_attention
from sendvae_fast.ops.attention.table import AttentionShape
from sendvae_fast.ops.attention.tuning import tune_attention
from sendvae_fast.ops.center_crop import (
    CenterCropBatch,
    center_crop,
    center_crop_batch,
    center_crop_batch_reference,
    center_crop_reference,
    center_crops,
    pillow_center_crop,
)
from sendvae_fast.ops.cosine_align import cosine_align, cosine_align_reference
from sendvae_fast.ops.dispatch import available_backends, chosen_backend, use_backend
from sendvae_fast.ops.global_norm import global_norm, global_norm_reference
from sendvae_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from sendvae_fast.ops.lpips_distance import lpips_distance, lpips_distance_reference
from sendvae_fast.ops.noise_inject import NoiseInjectOutput, noise_inject, noise_inject_reference
from sendvae_fast.ops.sde_step import SdeStepOutput, sde_step, sde_step_reference

__all__ = [
    "AttentionShape",
    "CenterCropBatch",
    "NoiseInjectOutput",
    "SdeStepOutput",
    "adaln",
    "adaln_reference",
    "adamw_ema_",
    "adamw_ema_reference_",
    "attention",
    "attention_reference",
    "available_attention",
    "available_backends",
    "center_crop",
    "center_crop_batch",
    "center_crop_batch_reference",
    "center_crop_reference",
    "center_crops",
    "chosen_backend",
    "cosine_align",
    "cosine_align_reference",
    "global_norm",
    "global_norm_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "lpips_distance",
    "lpips_distance_reference",
    "noise_inject",
    "noise_inject_reference",
    "philox",
    "pillow_center_crop",
    "sde_step",
    "sde_step_reference",
    "tune_attention",
    "use_attention",
    "use_backend",
]
