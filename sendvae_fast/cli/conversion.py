"""What `sendvae convert` does: weights from one layout into another."""

from pathlib import Path

from sendvae_fast.cli.convert_settings import ConvertConfig
from sendvae_fast.engine.run_weights import part_of, resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.files import AUTOENCODER_PART, staged_directory
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
from sendvae_fast.weights.catalog import catalog

_GENERATOR_LAYOUTS = ("generator", "repa", "repa-e", "lightningdit")


def convert(config: ConvertConfig) -> tuple[str, str]:
    """Write OUT; returns a description of the network and the origin of its statistics."""
    source = resolve_weights(config.source)
    with staged_directory(Path(config.out)) as folder:
        write = _convert_generator if config.to in _GENERATOR_LAYOUTS else _convert_autoencoder
        return write(config, source, folder)


def _convert_autoencoder(config: ConvertConfig, source: Path, folder: Path) -> tuple[str, str]:
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
        published = catalog().get(start)
    return Card(
        facts=facts_of_checkpoint(weights),
        licence=licence,
        base_model=None if published is None else published.hub,
        measured=measured_of_checkpoint(weights),
        picture=picture_of_checkpoint(weights),
    )


def _convert_generator(config: ConvertConfig, source: Path, folder: Path) -> tuple[str, str]:
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
