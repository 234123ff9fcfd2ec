"""Write an autoencoder or a generator in the layout of another program.

    sendvae convert runs/send --to=diffusers --out=send-vae-hf
    sendvae convert runs/send --to=diffusers --out=send-vae-hf --push=USER/NAME
    sendvae convert vavae-imagenet256-f16d32-dinov2.pt --stats=latents_stats.pt --to=sendvae --out=vavae
    sendvae convert sit-ldm-e2e-vavae.pt --to=generator --out=e2e-sit
    sendvae convert runs/xl --to=repa-e --out=xl-repa-e
    sendvae convert DiT-XL-2-256x256.pt --dit --scaling_factor=0.18215 --to=generator --out=dit

SOURCE is one of our folders or runs, a diffusers AutoencoderKL folder, a checkpoint file in the LDM layout, bare or
inside a training checkpoint (SD-VAE, VA-VAE, REPA-E), or a generator's checkpoint (SiT, REPA, REPA-E, LightningDiT).
No code in it is run, and an existing OUT is never overwritten. Weights stay the same bit by bit, except two layers
between our or REPA's generators and SiT's or LightningDiT's, whose time runs the other way. SiT's predicted sigma,
which no sampler uses, is dropped. DiT's checkpoints look like SiT's but are no flows: do not convert them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.engine.run_weights import part_of, resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.files import AUTOENCODER_PART, staged_directory
from sendvae_fast.hub import check_push, push_folder
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.export import Card, write_diffusers, write_ldm
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.autoencoder.maetok import MAETokConfig
from sendvae_fast.models.autoencoder.storage import load_autoencoder, save_autoencoder
from sendvae_fast.models.sit.model_card import write_card
from sendvae_fast.models.sit.storage import load_sit, save_sit, write_published
from sendvae_fast.train.e2e.repa_e_checkpoint import checkpoint_entries
from sendvae_fast.train.sit.model_card import facts_of_generator
from sendvae_fast.train.vae.model_card import (
    began_with,
    facts_of_checkpoint,
    measured_of_checkpoint,
    picture_of_checkpoint,
)

POSITIONAL = "source"
_GENERATOR_LAYOUTS = ("generator", "repa", "repa-e", "lightningdit")


@dataclass(kw_only=True)
class Config:
    """The weights to convert and the layout to write."""

    source: str
    """Folder, run or checkpoint file."""
    to: Literal["diffusers", "ldm", "sendvae", "generator", "repa", "repa-e", "lightningdit"]
    """An autoencoder: diffusers, what AutoencoderKL.from_pretrained reads; ldm, the files REPA-E loads; sendvae, our
    folder. A generator: generator, our folder; repa, repa-e (with the latents' batch norm) or lightningdit, a
    checkpoint that these load. An end-to-end run has both; its repa-e is one checkpoint of all
    networks and their optimizers' states, as train_repae.py resumes from."""
    out: str
    """Folder to write; must not exist."""
    stats: str | None = None
    """File with the latents' statistics, where SOURCE has none or other ones: ours, REPA-E's or LightningDiT's."""
    scaling_factor: float | None = None
    """One factor for all channels instead, as SD-VAE's 0.18215."""
    dit: bool = False
    """SOURCE is a checkpoint of DiT. Its weights look like SiT's and mean something else; with --to=generator."""
    licence: str = "unknown"
    """Licence of the weights, for the model card of --to=diffusers or generator: an identifier of the hub's, as mit."""
    push: str | None = None
    """Repository USER/NAME of the Hugging Face hub to upload OUT to, with --to=diffusers. A new one is private until
    you open it on its page. Needs `hf auth login`; without this option nothing leaves the machine."""

    def __post_init__(self) -> None:
        checks.weight_paths(self, "out")
        if not re.fullmatch(r"[\w.+-]+", self.licence):
            raise UserError(f"licence={self.licence} is no identifier of a licence: give mit, apache-2.0 or the like")
        if self.dit and self.to != "generator":
            raise UserError(f"--dit is for --to=generator: a DiT has no other layout here, not {self.to}")


def run(config: Config) -> None:
    """Read, check and write."""
    if config.push is not None:
        if config.to != "diffusers":
            raise UserError(f"--push is for --to=diffusers, whose layout the hub knows, not for --to={config.to}")
        check_push(config.push)
    source = resolve_weights(config.source)
    with staged_directory(Path(config.out)) as folder:
        convert = _convert_generator if config.to in _GENERATOR_LAYOUTS else _convert_autoencoder
        what, statistics_origin = convert(config, source, folder)
    print(f"{config.out}: {what}, {config.to} layout; latent statistics from {statistics_origin}")
    if config.push is not None:
        print(f"pushed: {push_folder(Path(config.out), config.push)}")


def _convert_autoencoder(config: Config, source: Path, folder: Path) -> tuple[str, str]:
    """Write OUT; returns a description of the network and the origin of its statistics."""
    saved = load_autoencoder(source, config.stats, config.scaling_factor)
    if config.to == "diffusers":
        name = config.push or Path(config.out).name
        write_diffusers(folder, saved, Path(config.source).name, card_of(source, config.licence), name)
    elif config.to == "ldm":
        write_ldm(folder, saved, Path(config.source).name)
    else:
        save_autoencoder(folder, saved.autoencoder, saved.latent_mean, saved.latent_std)
    return _words(saved.autoencoder), saved.statistics_origin


def _words(autoencoder: ImageAutoencoder) -> str:
    if isinstance(autoencoder, Autoencoder):
        return f"f{autoencoder.downsampling}d{autoencoder.config.latent_channels} autoencoder"
    sizes: MAETokConfig = autoencoder.config
    return f"MAETok of {sizes.num_latent_tokens} tokens of {sizes.latent_channels} channels"


def card_of(weights: Path, licence: str) -> Card:
    """What the model card of a run's weights says; little of other weights."""
    start, published = began_with(weights), None
    if start is not None:
        from sendvae_fast.weights.catalog import catalog  # brings timm along

        published = catalog().get(start)
    return Card(
        facts=facts_of_checkpoint(weights),
        licence=licence,
        base_model=None if published is None else published.hub,
        measured=measured_of_checkpoint(weights),
        picture=picture_of_checkpoint(weights),
    )


def _convert_generator(config: Config, source: Path, folder: Path) -> tuple[str, str]:
    """Write OUT; returns a description of the network and the origin of its statistics."""
    raw, ema = (load_sit(source, ema, config.stats, config.scaling_factor, config.dit) for ema in (False, True))
    sizes = ema.sit.config
    if config.to == "generator":
        save_sit(folder, sizes, raw.sit.state_dict(), ema.sit.state_dict(), ema.latent_mean, ema.latent_std)
        card = Card(
            facts=facts_of_generator(source),
            licence=config.licence,
            measured=measured_of_checkpoint(source, "generator"),
            picture=picture_of_checkpoint(source, "samples"),
        )
        write_card(folder, ema.sit, Path(config.source).name, card)
    else:
        whole = {}
        if config.to == "repa-e" and part_of(source, AUTOENCODER_PART) != source:  # an end-to-end run's
            if config.stats is not None or config.scaling_factor is not None:
                raise UserError(
                    f"{config.source} has a batch norm of its latents, which its checkpoint keeps: leave --stats and "
                    "--scaling_factor out"
                )
            whole = checkpoint_entries(source, raw, ema)
        write_published(folder, raw, ema, config.to, whole)
    latents = f"{' x '.join(map(str, sizes.latent_shape))} latents"
    return f"generator of {sizes.depth} blocks of width {sizes.width} for {latents}", ema.statistics_origin
