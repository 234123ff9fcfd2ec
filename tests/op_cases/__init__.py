"""The case tables of every op, through which both the CPU and the GPU tests run it."""

from op_cases import (
    adaln,
    adamw_ema,
    center_crop,
    cosine_align,
    global_norm,
    group_norm_silu,
    lpips_distance,
    noise_inject,
    sde_step,
)
from op_cases.common import OpTests

ALL: tuple[OpTests, ...] = (
    noise_inject.TESTS,
    cosine_align.TESTS,
    lpips_distance.TESTS,
    sde_step.TESTS,
    adaln.TESTS,
    center_crop.TESTS,
    group_norm_silu.TESTS,
    global_norm.TESTS,
    adamw_ema.TESTS,
)
