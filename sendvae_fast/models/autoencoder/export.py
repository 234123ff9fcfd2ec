"""Autoencoders for other programs: diffusers folders and files in the LDM layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.diffusers_layout import to_diffusers, to_diffusers_config
from sendvae_fast.models.autoencoder.storage import SavedAutoencoder, convolutional
from sendvae_fast.models.latent_statistics import save_repa_e_statistics

LDM_FILE = "vae.pt"

PICTURE_FILE = "reconstructions.png"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says beside what the weights themselves say."""

    facts: Mapping[str, object] = field(default_factory=dict)
    """How they were trained, a line each."""
    licence: str = "unknown"
    """Of the weights: one of the hub's identifiers."""
    base_model: str | None = None
    """Repository of the weights that training began with."""
    measured: Sequence[tuple[str, str, str]] = ()
    """Metric, value and protocol of each measurement."""
    picture: Path | None = None
    """PNG of originals over reconstructions."""


CITATION = """
## Citation

Send-VAE's method is that of

```bibtex
@article{sendvae,
  title = {Boosting Latent Diffusion Models via Semantic-Disentangled VAE},
  author = {Page, John and Niu, Xuesong and Wu, Kai and Gai, Kun},
  url = {https://github.com/Kwai-Kolors/Send-VAE}
}
```
"""
"""The last part of every card."""

_CARD = """---
library_name: diffusers
license: {licence}
{base_model}pipeline_tag: image-to-image
tags:
- autoencoder
- send-vae
---

# Autoencoder, {downsampling} times smaller, {channels} latent channels

A latent-diffusion autoencoder of {parameters:.1f}M parameters in float32, converted by sendvae_fast from `{source}`.
{facts}{picture}{measured}
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
{citation}"""


_PICTURE = f"""
![Originals, and below them what the autoencoder makes of them]({PICTURE_FILE})
"""


def write_diffusers(
    directory: Path,
    saved: SavedAutoencoder,
    source: str,
    card: Card | None = None,
    name: str = "FOLDER",
) -> None:
    """Put into `directory` what `diffusers.AutoencoderKL.from_pretrained` reads, and a model card.

    The card names `source`, has what `card` says, and opens the model as `name`. `UserError` for sizes that diffusers
    cannot express.
    """
    card = card or Card()
    autoencoder = convolutional(saved.autoencoder, source)
    config = autoencoder.config
    entries = to_diffusers_config(config, saved.latent_mean, saved.latent_std)
    state = {key: value.contiguous() for key, value in to_diffusers(autoencoder.state_dict(), config).items()}
    save_tensors(directory / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    if card.picture is not None:
        shutil.copyfile(card.picture, directory / PICTURE_FILE)
    text = _CARD.format(
        licence=card.licence,
        base_model="" if card.base_model is None else f"base_model: {card.base_model}\n",
        picture=_PICTURE if card.picture is not None else "",
        measured=measured_table(card.measured),
        downsampling=config.downsampling,
        channels=config.latent_channels,
        source=source,
        name=name,
        citation=CITATION,
        facts="\n" * bool(card.facts) + "".join(f"- {what}: {value}\n" for what, value in card.facts.items()),
        parameters=sum(weight.numel() for weight in autoencoder.parameters()) / 1e6,
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def measured_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """The measurements as a table."""
    if not rows:
        return ""
    lines = ["", "| metric | value | protocol |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, ""])


def write_ldm(directory: Path, saved: SavedAutoencoder, source: str) -> None:
    """Put into `directory` the bare state dict and the statistics file that REPA-E loads.

    `UserError` for another network than its own, or sizes that latent-diffusion's code fixes otherwise.
    """
    config = convolutional(saved.autoencoder, source).config
    if config.num_groups != AutoencoderConfig.num_groups:
        raise UserError(
            f"autoencoder num_groups={config.num_groups} has no LDM equivalent, its norms have "
            f"{AutoencoderConfig.num_groups} groups: convert --to=diffusers or --to=sendvae instead"
        )
    torch.save(dict(saved.autoencoder.state_dict()), directory / LDM_FILE)
    save_repa_e_statistics(directory / LDM_FILE, saved.latent_mean, saved.latent_std)
