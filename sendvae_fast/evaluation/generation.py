"""`sendvae evaluate generation`: how far generated pictures are from real ones, in the features of a network."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.distribution_metrics import Moments, Reference, distribution_metrics
from sendvae_fast.evaluation.drawn import open_drawn, sampling_settings, weights_of_samples
from sendvae_fast.evaluation.extraction import extract
from sendvae_fast.evaluation.feature_networks import load_features
from sendvae_fast.evaluation.features import FeatureNetwork
from sendvae_fast.evaluation.frechet import load_moments
from sendvae_fast.evaluation.inception import DIM, SPATIAL_DIM
from sendvae_fast.evaluation.job import Evaluation, Say
from sendvae_fast.evaluation.pictures import Pictures, npz_keys, open_pictures
from sendvae_fast.evaluation.result import Measurement, PicturesOrigin, Result
from sendvae_fast.evaluation.settings import METRICS, GenerationConfig, MetricName
from sendvae_fast.files import file_sha256

LEAST_PICTURES = 2


def evaluate_generation(config: GenerationConfig, say: Say = print) -> list[Result]:
    """Measure, and add the results to their file. Collective; rank 0 has the results, the others none.

    Everything that is given is looked at before the work begins.

    Raises:
        UserError: pictures or weights are missing or broken, or do not belong together.
    """
    config.features.check()
    ranks = init_distributed()
    samples, evaluation, run = _open_samples(config, ranks.device)
    pictures, moments = open_reference(config.reference, samples.origin.image_size, config.features.name)
    for role, given in (("samples", samples), ("reference", pictures)):
        if given is not None and len(given) < LEAST_PICTURES:
            raise UserError(
                f"{given.origin.path} has too few {role} pictures ({len(given)}) for a covariance: give at least "
                f"{LEAST_PICTURES}"
            )
    evaluation.pictures = {
        "samples": samples.origin,
        "reference": moments_origin(config.reference) if pictures is None else pictures.origin,
    }
    out = config.results_file(run)
    folder, is_kept = _features_folder(config, out)
    network = load_features(config.features, ranks.device)
    measured = measure_generation(samples, pictures, network, config.batch_size, moments, ranks, folder, config.metrics)
    results = evaluation.finish(measured, out, say) if ranks.is_main else []
    ranks.barrier()
    if ranks.is_main and folder is not None and not is_kept:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def measure_generation(
    samples: Pictures,
    reference: Pictures | None,
    network: FeatureNetwork,
    batch_size: int,
    moments: tuple[Moments, Moments | None] | None = None,
    distributed: Distributed | None = None,
    folder: Path | None = None,
    metrics: Collection[MetricName] = METRICS,
) -> list[Measurement]:
    """The metrics of samples against a reference. Collective where `folder` is given; rank 0 has them, the others none.

    Args:
        samples: generated pictures.
        reference: real pictures; None where there are moments alone.
        network: on the device to work on.
        batch_size: pictures at once.
        moments: of pooled and spatial features of the reference, in place of those of its pictures.
        distributed: the ranks that share the work.
        folder: for features, as in `extract`.
        metrics: those wanted.
    """
    ours = extract(samples, network, batch_size, distributed, folder, "features of samples")
    theirs = None
    if reference is not None:
        theirs = extract(reference, network, batch_size, distributed, folder, "features of the reference")
    if distributed is not None and not distributed.is_main:
        return []
    device = next(network.parameters()).device
    return distribution_metrics(ours, Reference(theirs, *(moments or (None, None))), network, device, metrics)


def open_reference(
    where: str, image_size: int, features: str
) -> tuple[Pictures | None, tuple[Moments, Moments | None] | None]:
    """The pictures and the moments that a reference has, at least one of them.

    Raises:
        UserError: it has neither, or only moments of other features than those asked for; or its pictures are of
            another size.
    """
    keys = npz_keys(where)
    if keys is None:
        return open_pictures(where, image_size), None
    moments = None
    if features == "inception" and {"mu", "sigma"} <= keys:
        spatial = _moments(where, "_s", SPATIAL_DIM) if {"mu_s", "sigma_s"} <= keys else None
        moments = _moments(where, "", DIM), spatial
    pictures = open_pictures(where, image_size) if "arr_0" in keys else None
    if pictures is None and moments is None:
        raise UserError(
            f"{where} has {', '.join(sorted(keys)) or 'nothing'}: give an npz with pictures (arr_0), or with moments "
            "of Inception's features (mu, sigma) and --features.name=inception"
        )
    return pictures, moments


def _open_samples(config: GenerationConfig, device: torch.device) -> tuple[Pictures, Evaluation, Path | None]:
    """The samples, the beginning of the evaluation, and the run of the generator."""
    if config.generator is not None and config.autoencoder is not None:
        drawn = open_drawn(config.generator, config.autoencoder, config.generate, config.ema, device)
        return drawn, Evaluation(weights=drawn.weights), run_of(Path(drawn.weights["generator"].path))
    samples = open_pictures(str(config.samples))
    settings = sampling_settings(str(config.samples))
    if len(samples) < (wanted := settings.get("num_samples", 0)):
        raise UserError(
            f"{config.samples} has {len(samples):,} of the {wanted:,} pictures that its settings ask for: run the same "
            "`sendvae sample` again to finish it"
        )
    samples.origin = replace(samples.origin, settings=settings)
    weights = weights_of_samples(settings)
    run = None
    if "generator" in weights and Path(weights["generator"].path).exists():
        run = run_of(resolve_weights(weights["generator"].path))
    return samples, Evaluation(weights=weights), run


def _features_folder(config: GenerationConfig, out: Path | None) -> tuple[Path | None, bool]:
    """Where features go, and whether they stay there."""
    if config.features_dir is not None:
        return Path(config.features_dir), True
    return (None, False) if out is None else (out.with_name(f"{out.name}.features"), False)


def _moments(path: str, suffix: str, dim: int) -> Moments:
    moments = Moments(*map(torch.from_numpy, load_moments(path, suffix)))
    if len(moments.mean) != dim:
        raise UserError(
            f"{path}: mu{suffix} has {len(moments.mean)} features, Inception {dim}: give a reference of its features"
        )
    return moments


def moments_origin(path: str) -> PicturesOrigin:
    """Of a reference of which there are moments alone, in an npz."""
    return PicturesOrigin(path=path, num_pictures=0, image_size=0, sha256=file_sha256(Path(path)), hash_of="contents")
