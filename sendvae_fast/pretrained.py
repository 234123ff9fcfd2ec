"""Trained networks for use in other programs: pictures to normalised latents and back, and pictures from a generator.

Shape letters: B batch, C latent channels, H W latent size, f the autoencoder's downsampling, S picture size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder import storage as autoencoder_storage
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.sampling.generate import Generated, LatentDecoder, check_fit, generate
from sendvae_fast.sampling.settings import GenerateConfig


class PretrainedAutoencoder(nn.Module):
    """An autoencoder and the statistics of its latents: pictures to normalised latents, and back.

    `network` is an `Autoencoder`, whose `encode` gives the moments of posteriors, or a `MAETok`. The buffers
    `latent_mean` and `latent_std`, float32 [C], move with it. Gradients flow where they are not turned off.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, network: ImageAutoencoder, latent_mean: Tensor, latent_std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("latent_mean", latent_mean)
        self.register_buffer("latent_std", latent_std)

    @property
    def downsampling(self) -> int:
        """f: picture size over latent size. `UserError` where latents are no grid of the picture (MAETok)."""
        if isinstance(self.network, Autoencoder):
            return self.network.downsampling
        raise UserError(
            f"the latents of a {type(self.network).__name__} are no grid of the picture: ask network.latent_shape(size)"
        )

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H f, W f], uint8 or in [-1, 1], to the means of their posteriors, normalised, [B, C, H, W].

        MAETok takes pictures of one size, and its latents are [B, C, 1, L].

        Raises:
            UserError: the picture size is no multiple of f, or not MAETok's.
        """
        if images.dtype == torch.uint8:
            images = to_model_range(images)
        weight = next(self.network.parameters())
        mean = self.network.posterior(images.to(weight.dtype)).mean
        latent_mean, latent_std = (part.to(mean).view(1, -1, 1, 1) for part in (self.latent_mean, self.latent_std))
        return (mean - latent_mean) / latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, H, W] to pictures [B, 3, H f, W f] near [-1, 1], not clamped."""
        return LatentDecoder(self.network, self.latent_mean, self.latent_std)(latents)


class PretrainedGenerator(nn.Module):
    """A SiT and the statistics of the latents that it was trained on: buffers `latent_mean`, `latent_std`, float32 [C].

    `network` is the `SiT` itself, which predicts velocities.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, network: SiT, latent_mean: Tensor, latent_std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("latent_mean", latent_mean)
        self.register_buffer("latent_std", latent_std)

    def sample(
        self,
        autoencoder: PretrainedAutoencoder,
        num_samples: int = 16,
        labels: int | Sequence[int] | None = None,
        **settings: Any,
    ) -> Generated:
        """Draw the pictures of sample ids 0 to N - 1; another `seed` gives other pictures.

        Args:
            autoencoder: the one whose latents the generator was trained on, on the same device.
            num_samples: N.
            labels: the class of all, or of each picture; where not given they are drawn as `settings` say.
            settings: other fields of `GenerateConfig`, such as ``guidance_scale``, ``seed``, ``precision`` and
                ``sampler=SamplerConfig(num_steps=50)``; the paper's where not given.

        Returns:
            (ids int64 [N], labels int64 [N], images uint8 [N, 3, S, S]), on the generator's device.

        Raises:
            UserError: settings out of range, an autoencoder that does not fit or is on another device, classes that the
                generator does not have.
        """
        device = self.latent_mean.device
        if autoencoder.latent_mean.device != device:
            raise UserError(
                f"the autoencoder is on {autoencoder.latent_mean.device}, the generator on {device}: move both to one"
            )
        config = GenerateConfig(num_samples=num_samples, **settings)
        check_fit(self.network.config, autoencoder.network, config)
        ids = torch.arange(num_samples, device=device)
        classes = None if labels is None else self._classes(labels, num_samples)
        decoder = LatentDecoder(autoencoder.network, self.latent_mean, self.latent_std)
        batches = list(generate(self.network, decoder, ids, config, labels=classes))
        return Generated(*map(torch.cat, zip(*batches, strict=True)))

    def _classes(self, labels: int | Sequence[int], num_samples: int) -> Tensor:
        classes = torch.as_tensor(labels, dtype=torch.int64, device=self.latent_mean.device)
        num_classes = self.network.config.num_classes
        if classes.dim() and classes.shape != (num_samples,):
            raise UserError(f"labels are {len(classes)} classes for {num_samples} pictures: give one, or one for each")
        if ((classes < 0) | (classes >= num_classes)).any():
            raise UserError(f"labels are {labels}, but the generator's classes are 0 to {num_classes - 1}")
        return classes.expand(num_samples)


def load_autoencoder(
    path: str | Path, *, stats: str | Path | None = None, scaling_factor: float | None = None
) -> PretrainedAutoencoder:
    """The autoencoder of a stage 1 run (its newest checkpoint), a checkpoint, an exported folder or a published file.

    Published files are SD-VAE's, VA-VAE's, REPA-E's and MAETok's, as folders or as ``.safetensors`` or ``.pth`` files.
    ``demo``, where there is no such path, is the small one of 32 px scenes that comes with the package. The result is
    on the CPU, in float32 and in evaluation mode.

    Args:
            path: what to load.
        stats: a file with the mean and deviation of the latents, in place of those found there.
        scaling_factor: one number for all channels in place of the statistics, such as SD-VAE's 0.18215.

    Raises:
        UserError: nothing of the kind is there, it is broken or not finite, or there are no statistics.
    """
    saved = autoencoder_storage.load_autoencoder(resolve_weights(path), stats, scaling_factor)
    return PretrainedAutoencoder(saved.autoencoder, saved.latent_mean, saved.latent_std).eval()


def load_generator(
    path: str | Path, *, ema: bool = True, stats: str | Path | None = None, scaling_factor: float | None = None
) -> PretrainedGenerator:
    """The generator of a stage 2 run (its newest checkpoint), a checkpoint, a folder or a published file.

    Published files are checkpoints of SiT, REPA, REPA-E and LightningDiT. The result is on the CPU, in float32 and in
    evaluation mode.

    Args:
        path: what to load.
        ema: take the moving average of the weights, as all published numbers do, where there is one.
        stats: as in `load_autoencoder`.
        scaling_factor: as in `load_autoencoder`.

    Raises:
        UserError: nothing of the kind is there, it is broken or not finite, or there are no statistics.
    """
    saved = load_sit(resolve_weights(path), ema, stats, scaling_factor)
    return PretrainedGenerator(saved.sit, saved.latent_mean, saved.latent_std).eval()
