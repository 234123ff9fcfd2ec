"""An evaluation job: reconstructions of an autoencoder, attributes in its latents, realism of generated pictures.

Metric names are those of the report: rfid, psnr, ssim, lpips, attribute_f1, gfid. The Fréchet distances are between
mean-pooled tokens of the chosen foundation model, so they compare runs of this project with each other; they are FID
proper only with Inception's features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sendvae_fast import checks
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.loader import ImageLoader, LoaderConfig
from sendvae_fast.data.sources.base import Source
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.attribute_probe import ProbeResult, probe_attributes
from sendvae_fast.evaluation.frechet import FeatureStatistics, feature_statistics, frechet_distance
from sendvae_fast.evaluation.reconstruction_quality import ReconstructionMeter
from sendvae_fast.files import write_atomic
from sendvae_fast.losses.perceptual import Perceptual, PerceptualConfig
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder, Posterior
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.foundation import Foundation, load_foundation
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.progress import Progress
from sendvae_fast.sampling.writer import PngFolder


@dataclass(kw_only=True)
class EvaluateConfig:
    """The networks and pictures to measure. Raises `UserError` for a value out of range, and for nothing to measure."""

    data: str
    """Held-out pictures: an ImageFolder, tar shards, parquet files or a catalog."""
    autoencoder: str | None = None
    """Autoencoder folder or run: measures its reconstructions of `data`."""
    train_data: str | None = None
    """ImageFolder with attributes.csv: with `autoencoder`, linear probes are trained on it and scored on `data`."""
    samples: str | None = None
    """Folder of generated PNG files, as `sendvae sample` writes it: measures their distance from real pictures."""
    reference: str | None = None
    """The real pictures that `samples` are compared with; `data` without it."""
    image_size: int = 256
    """Side of the ADM centre crop in pixels."""
    batch_size: int = 64
    """Pictures at once."""
    foundation: FoundationConfig = field(default_factory=lambda: FoundationConfig(name="demo"))
    """Foundation model whose pooled features the Fréchet distances compare."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and weights; without it LPIPS is not measured."""
    out: str | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "image_size", "batch_size")
        if self.autoencoder is None and self.samples is None:
            raise UserError("nothing to evaluate: give --autoencoder, --samples or both")
        if self.train_data is not None and self.autoencoder is None:
            raise UserError("train_data is for probing latents: give --autoencoder too")


class Evaluator:
    """Measures on one device. Reference statistics are kept, so that several models share them."""

    def __init__(
        self,
        foundation: FoundationConfig,
        perceptual: PerceptualConfig | None,
        image_size: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.device, self.image_size, self.batch_size = device, image_size, batch_size
        self.foundation: Foundation = load_foundation(foundation).to(device)
        self.perceptual = None if perceptual is None else Perceptual(perceptual).to(device)
        self._references: dict[Source, FeatureStatistics] = {}

    def reconstruction(self, autoencoder: Autoencoder, catalog: Catalog) -> dict[str, float | None]:
        """rfid, psnr, ssim and lpips (None without its weights) of reconstructions through the posterior mean."""
        meter, reconstructed = ReconstructionMeter(self.perceptual), FeatureStatistics(self.foundation.dim)
        with torch.no_grad():
            for images in self._images(catalog, "reconstructing"):
                decoded = autoencoder(to_model_range(images))
                meter.update(images, decoded)
                reconstructed.update(self.foundation.pooled(to_uint8(decoded, "round")))
        quality = meter.result()
        rfid = self._distance(self.reference(catalog), reconstructed)
        return {"rfid": rfid, "psnr": quality.psnr, "ssim": quality.ssim, "lpips": quality.lpips}

    def attributes(self, autoencoder: Autoencoder, train: Catalog, test: Catalog) -> ProbeResult:
        """Linear probes from flattened posterior means to the catalogs' attributes."""
        tables = []
        for catalog in (train, test):
            if catalog.attributes is None:
                raise UserError(f"{catalog.root} has no attributes.csv; probing needs one in both folders")
            tables.append(catalog.attributes)
        parts = [self.latents(autoencoder, catalog) for catalog in (train, test)]
        values = [torch.from_numpy(table.values).to(self.device) for table in tables]
        return probe_attributes(parts[0], values[0], parts[1], values[1], tables[0].names)

    def generation(self, samples: PngFolder, reference: Catalog) -> float:
        """gfid: distance of generated pictures from real ones."""
        ids = samples.sample_ids()
        batches = (images.to(self.device) for images in samples.batches(ids, self.batch_size))
        return self._distance(self.reference(reference), feature_statistics(self.foundation.pooled, batches))

    @torch.no_grad()
    def latents(self, autoencoder: Autoencoder, catalog: Catalog) -> Tensor:
        """Flattened posterior means [num, C H W] of a catalog's pictures."""
        means = [
            Posterior.from_moments(autoencoder.encode(to_model_range(images))).mean.flatten(1)
            for images in self._images(catalog, "encoding")
        ]
        return torch.cat(means)

    def reference(self, catalog: Catalog) -> FeatureStatistics:
        """Feature statistics of real pictures."""
        if catalog.source not in self._references:
            images = self._images(catalog, "real features")
            self._references[catalog.source] = feature_statistics(self.foundation.pooled, images)
        return self._references[catalog.source]

    def _images(self, catalog: Catalog, title: str) -> Iterator[Tensor]:
        loader = ImageLoader(catalog, self.image_size, LoaderConfig(cache_mb=0))
        with Progress(title, len(catalog), unit="image") as progress:
            for batch in loader.in_order(self.batch_size):
                yield batch.images.to(self.device)
                progress.advance(len(batch.ids))

    @staticmethod
    def _distance(real: FeatureStatistics, other: FeatureStatistics) -> float:
        return frechet_distance(real.mean, real.covariance, other.mean, other.covariance)


def evaluate(config: EvaluateConfig, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Measure all that the config asks for; returns (and writes to `config.out`) {"metrics": ..., "attribute_f1": ...}.

    Runs on one rank.
    """
    device = init_distributed().device
    evaluator = Evaluator(config.foundation, config.perceptual, config.image_size, config.batch_size, device)
    data = Catalog.open(config.data)
    metrics: dict[str, float | None] = {}
    attribute_f1: dict[str, float] = {}
    if config.autoencoder is not None:
        autoencoder = load_autoencoder(resolve_weights(config.autoencoder)).autoencoder.to(device)
        metrics.update(evaluator.reconstruction(autoencoder, data))
        if config.train_data is not None:
            probe = evaluator.attributes(autoencoder, Catalog.open(config.train_data), data)
            metrics["attribute_f1"] = probe.mean_f1
            attribute_f1 = dict(zip(probe.names, probe.f1, strict=True))
    if config.samples is not None:
        reference = data if config.reference is None else Catalog.open(config.reference)
        metrics["gfid"] = evaluator.generation(PngFolder(config.samples), reference)
    for name, value in metrics.items():
        say(f"{name:14s} {'not measured' if value is None else f'{value:.4f}'}")
    result = {"metrics": metrics, "attribute_f1": attribute_f1}
    if config.out is not None:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(config.out), json.dumps(result, indent=1) + "\n")
    return result
