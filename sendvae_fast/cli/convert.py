"""Write an autoencoder in the layout of another program, weights unchanged bit by bit.

    sendvae convert runs/send --to=diffusers --out=send-vae-hf
    sendvae convert vavae-imagenet256-f16d32-dinov2.pt --stats=latents_stats.pt --to=sendvae --out=vavae

SOURCE is one of our folders or runs, a diffusers AutoencoderKL folder, or a checkpoint file in the LDM layout, bare or
inside a training checkpoint (SD-VAE, VA-VAE, REPA-E). Nothing in it is run, and an existing OUT is never overwritten.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sendvae_fast.engine.weights import resolve_weights
from sendvae_fast.files import staged_directory
from sendvae_fast.models.autoencoder_export import write_diffusers, write_ldm
from sendvae_fast.models.autoencoder_io import load_autoencoder, save_autoencoder

POSITIONAL = "source"


@dataclass(kw_only=True)
class Config:
    """What to convert to what."""

    source: str
    """Folder, run or checkpoint file."""
    to: Literal["diffusers", "ldm", "sendvae"]
    """diffusers: what AutoencoderKL.from_pretrained reads; ldm: the files REPA-E loads; sendvae: our folder."""
    out: str
    """Folder to write; must not exist."""
    stats: str | None = None
    """File with the latents' statistics, where SOURCE has none or other ones: ours, REPA-E's or LightningDiT's."""
    scaling_factor: float | None = None
    """One factor for all channels instead, as SD-VAE's 0.18215."""


def run(config: Config) -> None:
    """Read, check and write."""
    source = resolve_weights(config.source)
    with staged_directory(Path(config.out)) as folder:
        saved = load_autoencoder(source, config.stats, config.scaling_factor)
        if config.to == "diffusers":
            write_diffusers(folder, saved, Path(config.source).name)
        elif config.to == "ldm":
            write_ldm(folder, saved)
        else:
            save_autoencoder(folder, saved.autoencoder, saved.latent_mean, saved.latent_std)
    sizes = saved.autoencoder.config
    print(
        f"{config.out}: f{sizes.downsampling}d{sizes.latent_channels} autoencoder, {config.to} layout; latent "
        f"statistics from {saved.statistics_origin}"
    )
