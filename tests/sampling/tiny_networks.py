"""A SiT and an autoencoder with random weights, small enough for a test, as folders on disk."""

from pathlib import Path

import torch

from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.storage import save_autoencoder
from sendvae_fast.models.sit.sit import SiT, SiTConfig
from sendvae_fast.models.sit.storage import save_sit

CHANNELS = 4
NUM_CLASSES = 3


def tiny_sit(seed: int = 0, **sizes) -> SiT:
    """A SiT whose velocity is not 0, as that of a new one is."""
    torch.manual_seed(seed)
    own = dict(
        latent_size=8, latent_channels=CHANNELS, patch_size=2, width=32, depth=2, num_heads=2, num_classes=NUM_CLASSES
    )
    sit = SiT(SiTConfig(**{**own, **sizes}))
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return sit.eval()


def save_generator(directory: Path, seed: int = 0, **sizes) -> Path:
    """A SiT folder."""
    sit = tiny_sit(seed, **sizes)
    state, channels = sit.state_dict(), sit.config.latent_channels
    save_sit(directory, sit.config, state, state, torch.zeros(channels), torch.ones(channels))
    return directory


def save_decoder(directory: Path, channels: int = CHANNELS) -> Path:
    """An autoencoder folder: 8 x 8 latents to pictures of 16 x 16."""
    torch.manual_seed(1)
    autoencoder = Autoencoder(AutoencoderConfig(
        base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), nominal_resolution=16,
        latent_channels=channels, num_groups=4,
    ))  # fmt: skip
    save_autoencoder(directory, autoencoder, torch.zeros(channels), torch.ones(channels))
    return directory
