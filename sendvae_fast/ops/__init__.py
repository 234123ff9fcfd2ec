"""Fused operations and the random numbers they draw. See docs/design.md, "Op" and "Randomness"."""

from sendvae_fast.ops import philox
from sendvae_fast.ops.adaln import adaln, adaln_reference
from sendvae_fast.ops.cosine_align import cosine_align, cosine_align_reference
from sendvae_fast.ops.dispatch import available_backends, chosen_backend, use_backend
from sendvae_fast.ops.noise_inject import NoiseInjectOutput, noise_inject, noise_inject_reference
from sendvae_fast.ops.sde_step import SdeStepOutput, sde_step, sde_step_reference

__all__ = [
    "NoiseInjectOutput",
    "SdeStepOutput",
    "adaln",
    "adaln_reference",
    "available_backends",
    "chosen_backend",
    "cosine_align",
    "cosine_align_reference",
    "noise_inject",
    "noise_inject_reference",
    "philox",
    "sde_step",
    "sde_step_reference",
    "use_backend",
]
