"""What can be said of latents without a decoder, and of a decoder without a generator.

Latents are normalised as the generator sees them: mean 0 and deviation 1 by channel. Shape letters: n pictures, C
channels, H latent size, d = C H H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.data.attributes import Attributes
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.evaluation.latent_space.sensitivity import decoder_sensitivity
from sendvae_fast.evaluation.latent_space.spectrum import band_powers
from sendvae_fast.evaluation.probing.attribute_probe import Labelled, held_out, probe_attributes
from sendvae_fast.evaluation.probing.linear_fit import LinearModel, fit_linear
from sendvae_fast.evaluation.probing.rows import Rows
from sendvae_fast.evaluation.settings import ProbeConfig
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.ops import noise_inject, philox

BATCH_SIZE = 250
NOISE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""At which the velocity is judged."""
NOISE_SEED = 7
"""Of the noise on held-out latents and on decoded ones."""
PROBE = ProbeConfig(inverse_penalty=0.01, max_iterations=300)
"""Heavier than scikit-learn's default: d is not small beside n here."""


@dataclass(frozen=True)
class LatentSet:
    """The latents of pictures: posterior mean and deviation [n, C, H, H] of each, normalised, on the CPU."""

    mean: Tensor
    std: Tensor
    labels: Tensor
    """Classes int64 [n]."""

    @classmethod
    def of_cache(cls, cache: LatentCache) -> LatentSet:
        """All of a cache."""
        mean, std, labels = cache.load(np.arange(len(cache)))
        return cls(*normalised(mean.float(), std.float(), cache.latent_mean, cache.latent_std), labels)

    @classmethod
    @torch.no_grad()
    def of_pictures(cls, autoencoder: ImageAutoencoder, catalog: Catalog, size: int, cache: LatentCache) -> LatentSet:
        """Encoded now, normalised like a cache."""
        device = next(autoencoder.parameters()).device
        parts = []
        for batch in ImageLoader(catalog, size, LoaderConfig(cache_mb=0, num_threads=1)).in_order(BATCH_SIZE):
            posterior = autoencoder.posterior(to_model_range(batch.images.to(device)))
            parts.append((posterior.mean.cpu(), posterior.std.cpu(), batch.labels))
        mean, std, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(*normalised(mean, std, cache.latent_mean, cache.latent_std), labels)

    def __len__(self) -> int:
        return len(self.mean)

    def take(self, ids: Tensor) -> LatentSet:
        """Some of them."""
        return LatentSet(self.mean[ids], self.std[ids], self.labels[ids])

    def samples(self, seed: int = NOISE_SEED) -> Tensor:
        """One of each posterior."""
        key = philox.make_key(seed, 0)
        return self.mean + self.std * philox.normal(
            key, philox.Stream.POSTERIOR, torch.arange(len(self)), self.mean.shape[1:]
        )


def normalised(mean: Tensor, std: Tensor, latent_mean: Tensor, latent_std: Tensor) -> tuple[Tensor, Tensor]:
    """Posteriors [n, C, H, H] with the statistics [C] of a cache taken off."""
    return (mean - latent_mean[:, None, None]) / latent_std[:, None, None], std / latent_std[:, None, None]


def spectrum(latents: Tensor) -> dict[str, Any]:
    """Of samples [n, C, H, H]: shares of power by ring of frequencies, and the effective rank of their covariance.

    The effective rank is exp of the entropy of the eigenvalues' shares (Roy and Vetterli, 2007), at most d.
    """
    eigenvalues = covariance_spectrum(latents)
    shares = eigenvalues / eigenvalues.sum()
    bands = band_powers(latents.split(BATCH_SIZE))
    return {
        "band_powers": bands.tolist(),
        "mean_share": float(bands[0]),
        "effective_rank": float(torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum())),
        "dimensions": len(eigenvalues),
    }


def covariance_spectrum(latents: Tensor) -> Tensor:
    """Eigenvalues of the covariance of samples [n, C, H, H] flattened, float64 [d], none below 0."""
    return torch.linalg.eigvalsh(torch.cov(latents.double().flatten(1).T)).clamp(min=0)


def attribute_f1(train: LatentSet, test: LatentSet, of_train: Attributes, of_test: Attributes) -> dict[str, Any]:
    """Macro F1 of linear probes of posterior means, fitted on training pictures and scored on held-out ones."""
    fitted, tuned = held_out(len(train), 0.1, seed=0)
    values = torch.from_numpy(of_train.values).float()
    scores = probe_attributes(
        Labelled(Rows(train.mean, ids=fitted), values[fitted]),
        Labelled(Rows(train.mean, ids=tuned), values[tuned]),
        Labelled(Rows(test.mean), torch.from_numpy(of_test.values).float()),
        of_train.names,
        PROBE,
    )
    each = dict(zip(scores.names, scores.at_half.each, strict=True))
    return {"f1": scores.at_half.macro.value, "f1_interval": scores.at_half.macro.interval, "f1_by_attribute": each}


@dataclass(frozen=True)
class ClassProbe:
    """A linear model of classes of latents."""

    model: LinearModel
    accuracy: float
    """On held-out pictures."""

    @classmethod
    def fit(cls, train: LatentSet, test: LatentSet) -> ClassProbe:
        """Fit it to samples of training pictures, score it on samples of held-out ones."""
        num_classes = int(train.labels.max()) + 1
        model = fit_linear(Rows(train.samples()), train.labels, num_classes, PROBE, "softmax")
        return cls(model, class_accuracy(model, test.samples(), test.labels))

    def of_generated(self, latents: Tensor, labels: Tensor) -> float:
        """Share of generated latents that it finds to be of the class that was asked for."""
        return class_accuracy(self.model, latents, labels)


def class_accuracy(model: LinearModel, latents: Tensor, labels: Tensor) -> float:
    """Share of latents [n, C, H, H] of which a probe finds the class."""
    return float((model.logits(Rows(latents)).argmax(dim=1).cpu() == labels.cpu()).float().mean())


@torch.no_grad()
def velocity_errors(sit: SiT, held_out_set: LatentSet, eigenvalues: Tensor) -> dict[str, Any]:
    """How well a generator knows held-out latents, by noise level t.

    `velocity_loss`: mean squared error of the velocity. `denoising_error`: t² of it, the error of the latent that it
    implies as a share of the latent's variance. `of_gaussian`: the loss over that of the best linear estimate, which is
    the mean over the covariance's eigenvalues λ of λ / ((1 - t)² λ + t²): below 1 it knows more than the covariance.

    Args:
        sit: the generator.
        held_out_set: of pictures that it has not seen, each judged at all levels.
        eigenvalues: of the training latents' covariance, [d].
    """
    device = next(sit.parameters()).device
    channels = held_out_set.mean.shape[1]
    zeros, ones = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    losses, gaussian = [], []
    for number, t in enumerate(NOISE_LEVELS):
        parts = []
        for ids in torch.arange(len(held_out_set)).split(BATCH_SIZE):
            levels = torch.full((len(ids),), t, device=device)
            noised = noise_inject(
                held_out_set.mean[ids].to(device), held_out_set.std[ids].to(device), zeros, ones,
                philox.make_key(NOISE_SEED, number, device), ids.to(device), levels,
                spread_is_std=True, patch_size=sit.config.patch_size,
            )  # fmt: skip
            velocity, _ = sit(noised.z_t, noised.t, held_out_set.labels[ids].to(device))
            parts.append((velocity - noised.velocity).float().square().flatten(1).mean(dim=1).cpu())
        losses.append(float(torch.cat(parts).mean()))
        gaussian.append(float((eigenvalues / ((1 - t) ** 2 * eigenvalues + t**2)).mean()))
    variance = float(eigenvalues.mean())
    return {
        "velocity_loss": dict(zip(map(str, NOISE_LEVELS), losses, strict=True)),
        "denoising_error": {str(t): t**2 * loss / variance for t, loss in zip(NOISE_LEVELS, losses, strict=True)},
        "of_gaussian": {str(t): a / b for t, a, b in zip(NOISE_LEVELS, losses, gaussian, strict=True)},
        "mean_velocity_loss": float(np.mean(losses)),
        "mean_of_gaussian": float(np.mean(losses) / np.mean(gaussian)),
    }


def sensitivity(decode: Callable[[Tensor], Tensor], latents: Tensor) -> dict[str, float]:
    """Change of decoded pictures over the noise, by the noise's size in deviations of normalised latents.

    decode: normalised latents [B, C, H, H] to pictures in [-1, 1].
    """

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for ids in torch.arange(len(latents)).split(BATCH_SIZE):
            yield ids, latents[ids]

    found = decoder_sensitivity(decode, batches(), torch.ones(latents.shape[1], device=latents.device), NOISE_SEED)
    return {f"{level:g}": float(values.mean()) for level, values in found.items()}


def with_noise(latents: Tensor, level: float) -> Tensor:
    """Latents [n, C, H, H] with normal noise of `level` deviations, the same for all autoencoders of these sizes."""
    key = philox.make_key(NOISE_SEED, 1)
    noise = philox.normal(key, philox.Stream.INTERPOLANT, torch.arange(len(latents)), latents.shape[1:])
    return latents + level * noise
