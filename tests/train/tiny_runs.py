"""Training runs small enough for a test: 32 px pictures, 8 x 8 latents, networks of a few thousand parameters."""

from pathlib import Path
from typing import Any

import torch
from saved_tensors import tensors_in

from sendvae_fast.config import build_config, merge
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.train.cache_latents import cache
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.settings import CacheConfig
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.settings import VAETrainConfig

NUM_IMAGES = 24  # one of each class
VAE = {
    "data": {"image_size": 32, "global_batch": 8, "num_threads": 1},
    "autoencoder": {
        "base_channels": 8,
        "channel_multipliers": [1, 2, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "nominal_resolution": 32,
        "latent_channels": 4,
        "num_groups": 4,
    },
    "alignment": {
        "foundation": {"name": "demo"},
        "send": {"width": 32, "depth": 1, "num_heads": 2, "projector_width": 32},
        "reals": {"width": 32},
    },
    "discriminator": {"base_channels": 8, "num_layers": 2, "norm": "group"},
    "optimizer": {"learning_rate": 2e-3},
    "loop": {"log_every": 1, "save_every": 1000, "preview_every": 1000},
}
SIT = {
    "data": {"image_size": 32, "global_batch": 8, "num_threads": 1},
    "generator": {"preset": None, "width": 32, "depth": 2, "num_heads": 2, "projector_width": 32},
    "repa": {"foundation": {"name": "demo"}, "block": 1},
    "optimizer": {"learning_rate": 2e-3, "ema_decay": 0.9},
    "loop": {"log_every": 1, "save_every": 1000, "preview_every": 1000},
    "preview": {"num_samples": 4, "batch_size": 4, "sampler": {"num_steps": 2}},
}
E2E = {
    **{key: VAE[key] for key in ("data", "autoencoder", "discriminator", "optimizer", "loop")},
    **{key: SIT[key] for key in ("generator", "repa", "preview")},
    "generator_optimizer": SIT["optimizer"],
}

# For runs that are compared with each other: with Adam's usual eps a gradient that is all rounding moves its weight by
# a whole learning rate, whichever way the rounding falls.
COMPARED = {"optimizer": {"eps": 1e-3}, "discriminator_optimizer": {"eps": 1e-3}}
COMPARED_E2E = COMPARED | {"generator_optimizer": {"eps": 1e-3}}


def vae_config(run: Path, images: Path, **settings: Any) -> VAETrainConfig:
    """A stage 1 config; `settings` are merged over the tiny defaults."""
    return build_config(VAETrainConfig, merge(merge(VAE, {"run": str(run), "data": {"root": str(images)}}), settings))


def e2e_config(run: Path, images: Path, **settings: Any) -> E2ETrainConfig:
    """A config of an end-to-end run; `settings` are merged over the tiny defaults."""
    return build_config(E2ETrainConfig, merge(merge(E2E, {"run": str(run), "data": {"root": str(images)}}), settings))


def sit_config(run: Path, images: Path, latents: Path, **settings: Any) -> SiTTrainConfig:
    """A stage 2 config; `settings` are merged over the tiny defaults."""
    own = {"run": str(run), "latents": str(latents), "data": {"root": str(images)}}
    return build_config(SiTTrainConfig, merge(merge(SIT, own), settings))


def cache_of(autoencoder: Path, images: Path, out: Path, **settings: Any) -> Path:
    """The latents of `images`."""
    config = CacheConfig(
        out=str(out), autoencoder=str(autoencoder), data=str(images), image_size=32, batch_size=8, **settings
    )
    cache(config, init_distributed("cpu"))
    return out


def checkpoint_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a run's checkpoint: see `tensors_in`."""
    return tensors_in(run / "checkpoints" / f"step_{step:08d}")
