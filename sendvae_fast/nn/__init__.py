"""Modules and an optimizer on the fused ops, for any network; `accelerate` puts them into a network."""

from sendvae_fast.engine.optimizer import AdamWEMA
from sendvae_fast.models.noise_injection import NoiseInjection
from sendvae_fast.models.norms import AdaLayerNorm, AdaRMSNorm, GroupNormSiLU
from sendvae_fast.nn.accelerate import accelerate
from sendvae_fast.nn.patch_alignment import PatchAlignment

__all__ = ["AdaLayerNorm", "AdaRMSNorm", "AdamWEMA", "GroupNormSiLU", "NoiseInjection", "PatchAlignment", "accelerate"]
