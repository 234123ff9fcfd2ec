"""`sendvae evaluate reconstruction`: what an autoencoder loses of real pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sendvae_fast import checks
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.evaluation.distribution_metrics import too_few
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.evaluation.features import FeatureNetwork
from sendvae_fast.evaluation.frechet import FeatureStatistics, frechet_distance
from sendvae_fast.evaluation.job import Evaluation, EvaluationConfig, Say
from sendvae_fast.evaluation.origins import crop_size, weights_origin
from sendvae_fast.evaluation.pictures import Pictures, open_pictures
from sendvae_fast.evaluation.reconstruction_quality import ReconstructionMeter
from sendvae_fast.evaluation.result import Measurement, Result
from sendvae_fast.losses.perceptual import Perceptual, PerceptualConfig
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.progress import Progress


@dataclass(kw_only=True)
class ReconstructionConfig(EvaluationConfig):
    """The autoencoder, the pictures and the networks that compare them."""

    autoencoder: str
    """Autoencoder folder or run."""
    data: str
    """Held-out pictures: an ImageFolder, tar shards, parquet files, a catalog, or an npz."""
    image_size: int | None = None
    """Side of the ADM centre crop in pixels; by default that of the autoencoder's run."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The feature network of the Fréchet distance."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and weights; without it LPIPS is not measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "image_size")


def evaluate_reconstruction(config: ReconstructionConfig, say: Say = print) -> list[Result]:
    """Measure, and add the results to their file. Everything that is given is looked at before the work begins.

    Raises:
        UserError: pictures or weights are missing or broken.
    """
    weights = resolve_weights(config.autoencoder)
    config.features.check()
    data = open_pictures(config.data, crop_size(config.image_size, weights))
    out = config.results_file(run_of(weights))
    device = init_distributed().device
    autoencoder = load_autoencoder(weights).autoencoder.to(device)
    perceptual = None if config.perceptual is None else Perceptual(config.perceptual).to(device)
    network = config.features.load(device)
    evaluation = Evaluation(
        weights={"autoencoder": weights_origin(weights, autoencoder)}, pictures={"data": data.origin}
    )
    return evaluation.finish(
        measure_reconstruction(autoencoder, data, network, perceptual, config.batch_size), out, say
    )


@torch.no_grad()
def measure_reconstruction(
    autoencoder: Autoencoder, data: Pictures, network: FeatureNetwork, perceptual: Perceptual | None, batch_size: int
) -> list[Measurement]:
    """Fréchet distance, PSNR, SSIM and, with `perceptual`, LPIPS of reconstructions through the posterior mean."""
    meter = ReconstructionMeter(perceptual)
    original, reconstructed = (FeatureStatistics(network.origin.dim) for _ in range(2))
    device = next(autoencoder.parameters()).device
    with Progress("reconstructing", len(data), unit="picture") as progress:
        for images in data.batches(batch_size):
            images = images.to(device)
            decoded = autoencoder(to_model_range(images))
            meter.update(images, decoded)
            original.update(network(images).pooled)
            reconstructed.update(network(to_uint8(decoded, "round")).pooled)
            progress.advance(len(images))
    quality, counts = meter.result(), {"pictures": len(data)}
    distance = Measurement(
        metric=network.metric("rfrechet"),
        value=frechet_distance(original.mean, original.covariance, reconstructed.mean, reconstructed.covariance),
        protocol=network.protocol,
        features=network.origin,
        counts=counts,
        remarks=(*network.remarks, *too_few(counts, network.origin.dim)),
    )
    values = {"psnr": quality.psnr, "ssim": quality.ssim}
    if perceptual is not None and quality.lpips is not None:
        values[f"lpips_{perceptual.net}"] = quality.lpips
    return [
        distance,
        *(Measurement(metric=name, value=value, protocol="adm", counts=counts) for name, value in values.items()),
    ]
