"""Pictures from a trained SiT: labels, noise, sampler, denormalise, decode.

Everything random is keyed by the sample's id, so the picture of an id is the same in any batch, on any rank.

Shape letters: B batch, C latent channels, H latent size, S picture size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder import Autoencoder
from sendvae_fast.models.sit import SiT
from sendvae_fast.sampling.guidance import guided
from sendvae_fast.sampling.labels import LabelSampling, sample_labels
from sendvae_fast.sampling.samplers import SamplerConfig, initial_noise, sample
from sendvae_fast.sampling.writer import Rounding, to_uint8


@dataclass(kw_only=True)
class GenerateConfig:
    """What to draw and how. The defaults are the paper's, with REPA-E's interval, which the paper leaves open."""

    num_samples: int = 50_000
    """Pictures."""
    batch_size: int = 64
    """Pictures drawn at once on a rank; does not change them."""
    guidance_scale: float = 2.5
    """Classifier-free guidance; 1 is none. The paper: 2.5."""
    guidance_interval: tuple[float, float] = (0.0, 0.75)
    """Noise levels at which to guide, both ends included."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels, as SiT and LightningDiT do (3); null guides all."""
    labels: LabelSampling = "random"
    """Classes: drawn by sample id (the paper, as REPA-E then), or an equal number of each (about 0.1 lower FID)."""
    rounding: Rounding = "truncate"
    """How [-1, 1] becomes 0..255: truncate as REPA does, or round half up as SiT does."""
    seed: int = 0
    """Seed of labels and noise."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The integrator."""

    def __post_init__(self) -> None:
        self.guidance_interval = tuple(self.guidance_interval)
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")


class Generated(NamedTuple):
    """A batch of pictures."""

    ids: Tensor  # int64 [B]
    labels: Tensor  # int64 [B]
    images: Tensor  # uint8 [B, 3, S, S]


class LatentDecoder(NamedTuple):
    """The way back from normalised latents to pictures."""

    autoencoder: Autoencoder
    latent_mean: Tensor  # [C]
    latent_std: Tensor  # [C]

    def __call__(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, H, H] to pictures [B, 3, S, S] near [-1, 1]."""
        mean, std = (part.to(latents).view(1, -1, 1, 1) for part in (self.latent_mean, self.latent_std))
        return self.autoencoder.decode(latents * std + mean)


@torch.no_grad()
def generate(
    sit: SiT, decoder: LatentDecoder, sample_ids: Tensor, config: GenerateConfig,
    on_step: Callable[[int], object] = lambda count: None,
) -> Iterator[Generated]:
    """Draw the pictures of `sample_ids` (int64 [N], on the networks' device), batch by batch.

    on_step: called after every sampler step with the number of pictures in the batch.
    """
    sit.eval()
    size, channels = sit.config.latent_size, config.guidance_channels
    if channels is not None and channels > sit.config.latent_channels:
        raise UserError(
            f"guidance_channels is {channels}, but the generator's latents have {sit.config.latent_channels} channels; "
            "give fewer, or null to guide all"
        )
    for ids in sample_ids.split(config.batch_size):
        labels = sample_labels(config.seed, ids, sit.config.num_classes, config.labels)
        velocity = guided(
            sit, labels, config.guidance_scale, config.guidance_interval, sit.config.num_classes, channels
        )
        noise = initial_noise(config.seed, ids, (sit.config.latent_channels, size, size))
        latents = sample(velocity, noise, ids, config.seed, config.sampler, lambda ids=ids: on_step(len(ids)))
        yield Generated(ids, labels, to_uint8(decoder(latents), config.rounding))
