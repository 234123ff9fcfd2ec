"""The networks of an end-to-end run.

Shape letters: B batch, S image size, C latent channels, H W latent size, N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.latent_batch_norm import LatentBatchNorm
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.models.sit.storage import load_initial_weights
from sendvae_fast.ops import noise_inject
from sendvae_fast.ops.noise_inject import NoiseInjectOutput
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.vae.networks import initial_autoencoder, tokens_per_side

LATENT_NORM_FILE = "latent_norm.safetensors"
"""The batch norm of a `NormalisingSiT` in a checkpoint, which its generator's folder lacks."""


class NoisedReconstruction(NamedTuple):
    """What one pass of the autoencoder gives."""

    reconstruction: Tensor  # [B, 3, S, S]
    moments: Tensor  # [B, 2C, H, W]
    z: Tensor  # [B, C, H, W], the sampled latent
    z_t: Tensor  # [B, N, C P P], the noised one, as the generator takes it
    t: Tensor  # float32 [B]


class NoisingAutoencoder(nn.Module):
    """An autoencoder whose latents come out noised as well.

    Args:
        autoencoder: the autoencoder to train.
        patch_size: latent positions per token and side of the generator.
    """

    def __init__(self, autoencoder: Autoencoder, patch_size: int) -> None:
        super().__init__()
        self.autoencoder, self.patch_size = autoencoder, patch_size

    def forward(
        self, x: Tensor, statistics: tuple[Tensor, Tensor], key: Tensor, sample_ids: Tensor, t: Tensor | None
    ) -> NoisedReconstruction:
        """Images [B, 3, S, S] in [-1, 1], and what `noise_inject` takes, to a `NoisedReconstruction`."""
        moments = self.autoencoder.encode(x)
        noised = noise_latents(moments, statistics, key, sample_ids, t, self.patch_size, need_velocity=False)
        return NoisedReconstruction(self.autoencoder.decode(noised.z), moments, noised.z, noised.z_t, noised.t)


def noise_latents(
    moments: Tensor,
    statistics: tuple[Tensor, Tensor],
    key: Tensor,
    sample_ids: Tensor,
    t: Tensor | None,
    patch: int,
    *,
    need_z: bool = True,
    need_velocity: bool = True,
) -> NoiseInjectOutput:
    """`noise_inject` of moments [B, 2C, H, W]. The same key and ids give the same latent, noise and level."""
    mean, logvar = moments.chunk(2, dim=1)
    return noise_inject(
        mean, logvar, *statistics, key, sample_ids, t,
        patch_size=patch, need_z=need_z, need_velocity=need_velocity,
    )  # fmt: skip


class NormalisingSiT(SiT):
    """A SiT with the batch norm of its latents, in the state-dict layout of REPA-E's."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__(config)
        self.bn = LatentBatchNorm(config.latent_channels)


def build_networks(
    config: E2ETrainConfig, foundation: Foundation, num_classes: int
) -> tuple[NoisingAutoencoder, NormalisingSiT]:
    """Autoencoder and generator, each from weights or fresh. Raises UserError for sizes that do not fit together."""
    autoencoder, statistics = initial_autoencoder(config)
    patch = config.generator.sizes()["patch_size"]
    grid = tokens_per_side(autoencoder, config.data.image_size, patch, "generator.patch_size")
    foundation.check_grid(grid)
    shape = (autoencoder.config.latent_channels, grid * patch, grid * patch)
    sizes = config.generator.build(shape, num_classes, foundation.dim, config.repa.block)
    sit = NormalisingSiT(sizes)
    if config.generator_from is not None:
        initial = SiT(sizes)
        load_initial_weights(initial, resolve_weights(config.generator_from))
        sit.load_state_dict(initial.state_dict(), strict=False)  # all but the batch norm
    if statistics is not None:
        sit.bn.set_statistics(*statistics)
    return NoisingAutoencoder(autoencoder, patch), sit
