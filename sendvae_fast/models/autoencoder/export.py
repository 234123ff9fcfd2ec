"""Autoencoders for other programs: diffusers folders and files in the LDM layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors
from sendvae_fast.models.autoencoder.autoencoder import AutoencoderConfig
from sendvae_fast.models.autoencoder.diffusers_layout import to_diffusers, to_diffusers_config
from sendvae_fast.models.autoencoder.storage import SavedAutoencoder
from sendvae_fast.models.latent_statistics import save_repa_e_statistics

LDM_FILE = "vae.pt"

_CARD = """---
library_name: diffusers
pipeline_tag: image-to-image
tags:
- autoencoder
- send-vae
---

# Autoencoder, {downsampling} times smaller, {channels} latent channels

A latent-diffusion autoencoder of {parameters:.1f}M parameters in float32, converted by sendvae_fast from `{source}`.
{facts}
```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{name}")
mean, std = (torch.tensor(s).view(1, -1, 1, 1) for s in (vae.config.latents_mean, vae.config.latents_std))
latents = (vae.encode(images).latent_dist.sample() - mean) / std  # images: [B, 3, H, W] in [-1, 1]
images = vae.decode(latents * std + mean).sample
```

Height and width of images must be multiples of {downsampling}. `latents_mean` and `latents_std` are per channel, of
samples of the posterior: generators see latents normalised by them. `scaling_factor` is 1 and not needed.
The weights' license is that of what they were made from.
"""


def write_diffusers(
    directory: Path,
    saved: SavedAutoencoder,
    source: str,
    facts: Mapping[str, object] | None = None,
    name: str = "FOLDER",
) -> None:
    """Put into `directory` what `diffusers.AutoencoderKL.from_pretrained` reads, and a model card.

    The card names `source`, lists `facts` about how the weights were trained, and opens the model as `name`.
    `UserError` for sizes that diffusers cannot express.
    """
    autoencoder, config = saved.autoencoder, saved.autoencoder.config
    entries = to_diffusers_config(config, saved.latent_mean, saved.latent_std)
    state = {key: value.contiguous() for key, value in to_diffusers(autoencoder.state_dict(), config).items()}
    save_tensors(directory / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    card = _CARD.format(
        downsampling=config.downsampling,
        channels=config.latent_channels,
        source=source,
        name=name,
        facts="\n" * bool(facts) + "".join(f"- {what}: {value}\n" for what, value in (facts or {}).items()),
        parameters=sum(weight.numel() for weight in autoencoder.parameters()) / 1e6,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def write_ldm(directory: Path, saved: SavedAutoencoder) -> None:
    """Put into `directory` the bare state dict and the statistics file that REPA-E loads.

    `UserError` for sizes that latent-diffusion's code fixes otherwise.
    """
    config = saved.autoencoder.config
    if config.num_groups != AutoencoderConfig.num_groups:
        raise UserError(
            f"autoencoder num_groups={config.num_groups} has no LDM equivalent, its norms have "
            f"{AutoencoderConfig.num_groups} groups: convert --to=diffusers or --to=sendvae instead"
        )
    torch.save(dict(saved.autoencoder.state_dict()), directory / LDM_FILE)
    save_repa_e_statistics(directory / LDM_FILE, saved.latent_mean, saved.latent_std)
