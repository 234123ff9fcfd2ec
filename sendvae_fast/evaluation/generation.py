"""`sendvae evaluate generation`: how far generated pictures are from real ones, in the features of a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run_weights import run_of
from sendvae_fast.evaluation.features import FeatureNetwork, FeaturesConfig
from sendvae_fast.evaluation.frechet import feature_statistics, frechet_distance
from sendvae_fast.evaluation.job import Evaluation, EvaluationConfig, Say
from sendvae_fast.evaluation.pictures import Pictures, open_pictures
from sendvae_fast.evaluation.result import Measurement, Result
from sendvae_fast.progress import Progress
from sendvae_fast.sampling.sample_to_folder import SETTINGS_FILE


@dataclass(kw_only=True)
class GenerationConfig(EvaluationConfig):
    """The pictures, and the network that looks at them."""

    samples: str
    """Generated pictures: a folder of PNG files, as `sendvae sample` writes it, or an npz of them."""
    reference: str
    """Real pictures: an ImageFolder, tar shards, parquet files, a catalog, or an npz."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The feature network."""


def evaluate_generation(config: GenerationConfig, say: Say = print) -> list[Result]:
    """Measure, and add the results to their file. Everything that is given is looked at before the work begins.

    Raises:
        UserError: pictures or weights are missing or broken.
    """
    config.features.check()
    samples = open_pictures(config.samples)
    reference = open_pictures(config.reference, samples.origin.image_size)
    out = config.results_file(_run_that_drew(config.samples))
    network = config.features.load(init_distributed().device)
    evaluation = Evaluation(pictures={"samples": samples.origin, "reference": reference.origin})
    return evaluation.finish(measure_generation(samples, reference, network, config.batch_size), out, say)


def measure_generation(
    samples: Pictures, reference: Pictures, network: FeatureNetwork, batch_size: int
) -> list[Measurement]:
    """The distances of samples from a reference, on the network's device."""
    statistics = [
        feature_statistics(lambda images: network(images).pooled, _shown(pictures, title, network, batch_size))
        for pictures, title in ((samples, "features of samples"), (reference, "features of the reference"))
    ]
    ours, theirs = statistics
    counts = {"samples": len(samples), "reference": len(reference)}
    return [
        Measurement(
            metric=network.metric("frechet"),
            value=frechet_distance(theirs.mean, theirs.covariance, ours.mean, ours.covariance),
            protocol=network.protocol,
            features=network.origin,
            counts=counts,
            remarks=(*network.remarks, *too_few(counts, network.origin.dim)),
        )
    ]


def too_few(counts: dict[str, int], dim: int) -> tuple[str, ...]:
    """A remark where there are fewer pictures than features: the covariances are singular then."""
    fewest = min(counts.values())
    if fewest > dim:
        return ()
    return (f"{fewest:,} pictures are no more than {dim:,} features: the distance is too large by an unknown amount",)


def _shown(pictures: Pictures, title: str, network: FeatureNetwork, batch_size: int):
    device = next(network.buffers()).device
    with Progress(title, len(pictures), unit="picture") as progress:
        for images in pictures.batches(batch_size):
            yield images.to(device)
            progress.advance(len(images))


def _run_that_drew(samples: str) -> Path | None:
    """The run of the generator, as the settings beside the samples name it; None without."""
    try:
        settings = yaml.safe_load((Path(samples) / SETTINGS_FILE).read_text(encoding="utf-8"))
        generator = Path(settings["generator"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return generator if (generator / "config.yaml").is_file() else run_of(generator)
