"""The work of a trial, from its autoencoder to its numbers: train, encode, train a generator, draw, measure.

Every part is a job that resumes and that finds at once what is there, so a trial may end anywhere, in any way, and be
gone on with by another process.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sendvae_fast.compare.parts import noting, seconds_of_parts
from sendvae_fast.compare.pictures import spread
from sendvae_fast.compare.plan import EVALUATION, GENERATOR, LATENTS, SAMPLES, Trial
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run_lock import wait_for_claim
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.evaluation.attributes import measure_attributes
from sendvae_fast.evaluation.distribution_metrics import Reference, distribution_metrics
from sendvae_fast.evaluation.extraction import FeatureSet, extract
from sendvae_fast.evaluation.feature_networks import load_features
from sendvae_fast.evaluation.features import FeatureNetwork
from sendvae_fast.evaluation.generation import moments_origin, open_reference
from sendvae_fast.evaluation.job import Evaluation
from sendvae_fast.evaluation.latent_space.view import write_view
from sendvae_fast.evaluation.latent_views import foundation_tokens, pictures_to_view, sights_of, view_latents
from sendvae_fast.evaluation.origins import weights_origin
from sendvae_fast.evaluation.pictures import CatalogPictures, Pictures, open_pictures
from sendvae_fast.evaluation.probing.benchmarks import csv_data
from sendvae_fast.evaluation.probing.encoding import encoded_rows, posterior_means
from sendvae_fast.evaluation.reconstruction import ReconstructionJob
from sendvae_fast.evaluation.reconstruction_protocols import PROTOCOLS, reconstructed_origin
from sendvae_fast.evaluation.result import Measurement
from sendvae_fast.evaluation.settings import ProbeConfig
from sendvae_fast.image_grid import save_grid
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.sampling.sample_to_folder import sample_to_folder
from sendvae_fast.sampling.writer import PngFolder
from sendvae_fast.train.cache_latents import cache
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.e2e.stage import train_e2e
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

ORIGINALS = "originals.png"
"""Beside the trials of a seed: the held-out pictures whose reconstructions the page shows."""
REFERENCE = "reference"
"""In the comparison's folder until all is measured: features that all trials compare with."""
NUM_STRIP = 10
"""Pictures in a strip of reconstructions."""
NUM_SHEET = 40
"""Pictures in a sheet of samples."""


@contextmanager
def part_of_trial(trial: Trial, name: str, ranks: Distributed) -> Iterator[list[int]]:
    """`noting` a part of a trial."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    with noting(trial.folder, name, ranks.is_main) as codes:
        yield codes


def train_autoencoder(trial: Trial, ranks: Distributed) -> int:
    """Train what is missing of a trial's autoencoder, and draw its reconstructions. Collective.

    Returns:
        The exit code of a training that was stopped by a signal, else 0.
    """
    config = trial.autoencoder_config
    if config is not None and not is_trained(trial):
        with part_of_trial(trial, trial.parts[0], ranks) as codes:
            codes.append(train_e2e(config) if isinstance(config, E2ETrainConfig) else train_vae(config))
        if any(codes):
            return max(codes)
    with ranks.all_or_none():
        if ranks.is_main and not trial.picture("reconstructions").is_file():
            draw_reconstructions(trial, ranks.device)
    return 0


def is_trained(trial: Trial) -> bool:
    """Whether a trial has its autoencoder."""
    return trial.method.weights is not None or trial.parts[0] in seconds_of_parts(trial.folder)


def run_trial(trial: Trial, ranks: Distributed, after_part: Callable[[], object] = lambda: None) -> int:
    """Do what is missing of a trial. Collective.

    Args:
        trial: whose start, if it has one, is trained.
        ranks: that share the work.
        after_part: called after each part.

    Returns:
        The exit code of a training that was stopped by a signal, else 0.

    Raises:
        UserError: what a verb raises.
    """
    if code := train_autoencoder(trial, ranks):
        return code
    after_part()
    with part_of_trial(trial, LATENTS, ranks):
        cache(trial.cache_config(), ranks)
    after_part()
    with part_of_trial(trial, GENERATOR, ranks) as codes:
        codes.append(train_sit(trial.generator_config))
    if any(codes):
        return max(codes)
    after_part()
    with part_of_trial(trial, SAMPLES, ranks):
        samples = sample_to_folder(trial.sample_config(), ranks)
        with ranks.all_or_none():
            if ranks.is_main:
                draw_samples(trial, samples)
    after_part()
    with part_of_trial(trial, EVALUATION, ranks):
        if not ranks.broadcast_object(trial.is_done):
            measure(trial, ranks)
    after_part()
    return 0


def draw_samples(trial: Trial, samples: PngFolder) -> None:
    """The sheet of the first generated pictures, whose noise and classes are the same for all methods of a seed."""
    sheet = next(samples.batches(samples.sample_ids()[:NUM_SHEET], NUM_SHEET))
    save_grid(trial.picture("samples"), sheet, columns=NUM_STRIP)


def draw_reconstructions(trial: Trial, device: torch.device) -> None:
    """The strip of originals, and of what a trial's autoencoder makes of them."""
    strip = spread(Catalog.open(trial.test), NUM_STRIP, trial.config.pictures.image_size).to(device)
    autoencoder = load_autoencoder(resolve_weights(trial.autoencoder)).autoencoder.to(device)
    with torch.no_grad():
        decoded = to_uint8(autoencoder(to_model_range(strip)), "round")
    if not (trial.place / ORIGINALS).is_file():
        save_grid(trial.place / ORIGINALS, strip, columns=len(strip))
    save_grid(trial.picture("reconstructions"), decoded, columns=len(decoded))


def measure(trial: Trial, ranks: Distributed) -> None:
    """Write the results of a trial: of its autoencoder and of its generator's pictures. Collective."""
    config, size = trial.config, trial.config.pictures.image_size
    train, test = (CatalogPictures(Catalog.open(where), size) for where in (trial.train, trial.test))
    weights = resolve_weights(trial.autoencoder)
    autoencoder = load_autoencoder(weights).autoencoder.to(ranks.device)
    samples = open_pictures(str(trial.folder / "generated"))
    reference, moments = train, None
    if config.reference is not None:
        reference, moments = open_reference(config.reference, size, config.features.name)
    origins = {"train": train.origin, "test": test.origin, "samples": samples.origin}
    if reference is not train:
        assert config.reference is not None
        origins["reference"] = moments_origin(config.reference) if reference is None else reference.origin
    evaluation = Evaluation(weights={"autoencoder": weights_origin(weights, autoencoder)}, pictures=origins)
    protocol, perceptual = PROTOCOLS[config.protocol], None
    if config.perceptual is not None:
        perceptual = Perceptual(config.perceptual).to(ranks.device)
    network, own = (load_features(config.features, ranks.device, resizing) for resizing in ("adm", protocol.resizing))
    job = ReconstructionJob(
        autoencoder=autoencoder,
        protocol=protocol,
        network=own,
        further=None if own.protocol == network.protocol else network,  # Inception's, of pictures resized otherwise
        perceptual=perceptual,
        batch_size=config.batch_size,
    )
    folder = trial.folder / "measuring"  # so that ranks share the work, and who is interrupted goes on
    reconstructed = job.compute(test, ranks, folder / "reconstructions")
    measured: list[Measurement] = job.measurements(reconstructed) if ranks.is_main else []
    if train.catalog.attributes is not None and test.catalog.attributes is not None:
        data = csv_data(train, test, None, trial.seed)
        identity = evaluation.weights["autoencoder"].sha256
        encode, features = posterior_means(autoencoder), trial.folder / "features"
        measured += measure_attributes(encode, identity, data, config.batch_size, features, ranks, ProbeConfig())
    measured += look_at_latents(trial, autoencoder, evaluation.weights["autoencoder"].sha256, test, folder, ranks)
    theirs = None if reference is None else _features_of_reference(trial, reference, network, ranks)
    ours = extract(samples, network, config.batch_size, ranks, folder, "features of samples")
    if "frechet" in config.metrics:
        evaluation.pictures["decoded"] = reconstructed_origin(evaluation.weights["autoencoder"], test, protocol)
    if ranks.is_main:
        given = Reference(theirs, *(moments or (None, None)))
        measured += distribution_metrics(ours, given, network, ranks.device, config.metrics)
        if "frechet" in config.metrics:
            decoded = Reference(job.features_of_reconstructions(reconstructed))
            of_decoded = distribution_metrics(ours, decoded, network, ranks.device, ["frechet"])
            measured += [replace(item, metric=network.metric("decoded_frechet")) for item in of_decoded]
        evaluation.finish(measured, trial.results, say=lambda line: None)
        shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()


def _features_of_reference(
    trial: Trial, reference: Pictures, network: FeatureNetwork, ranks: Distributed
) -> FeatureSet:
    """The features of what all trials' generated pictures are compared with, computed once for all. Collective."""
    folder = Path(trial.config.run) / REFERENCE
    with wait_for_claim(folder) if ranks.is_main else nullcontext():
        return extract(reference, network, trial.config.batch_size, ranks, folder, "features of the reference")


def look_at_latents(
    trial: Trial,
    autoencoder: ImageAutoencoder,
    identity: str,
    test: CatalogPictures,
    folder: Path,
    ranks: Distributed,
) -> list[Measurement]:
    """Draw what there is to see of a trial's latents, and measure it, on the first rank. Collective.

    Args:
        trial: whose latents, normalised as its generator has them.
        autoencoder: its own.
        identity: hash of its weights.
        test: the held-out pictures, some of which are looked at.
        folder: where ranks share the work.
        ranks: which they are.
    """
    config, (_, pictures) = trial.config, pictures_to_view(test, trial.config.views)
    shape = autoencoder.latent_shape(config.pictures.image_size)
    sights = sights_of(pictures.catalog.labels, shape)
    rows = encoded_rows(posterior_means(autoencoder), identity, pictures, folder, config.batch_size, ranks)
    tokens = None
    if "patches" in sights and trial.foundation is not None:
        model = load_foundation(trial.foundation)
        tokens = foundation_tokens(model, trial.foundation, pictures, folder, config.batch_size, ranks)
    measured: list[Measurement] = []
    with ranks.all_or_none():
        if ranks.is_main:
            cache = LatentCache.open(trial.folder / "latents")
            mean, std = (values.numpy()[:, None, None] for values in (cache.latent_mean, cache.latent_std))
            latents = (np.array(rows.features).reshape(-1, *shape) - mean) / std
            view, measured = view_latents(latents, pictures, tokens, config.views, sights)
            write_view(trial.view, view)
    return measured
