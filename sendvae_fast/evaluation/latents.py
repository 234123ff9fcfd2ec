"""`sendvae evaluate latents`: measures of a latent space that need no generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.intervals import interval_over_runs
from sendvae_fast.evaluation.job import Evaluation, Say
from sendvae_fast.evaluation.latent_space.clusters import has_clusters
from sendvae_fast.evaluation.latent_space.discrimination import discrimination, sizes_for
from sendvae_fast.evaluation.latent_space.learnability import velocity_loss_of_small_sit
from sendvae_fast.evaluation.latent_space.sensitivity import decoder_sensitivity
from sendvae_fast.evaluation.latent_space.spectrum import NUM_BANDS, band_powers
from sendvae_fast.evaluation.latent_space.uniformity import check_number, uniformity
from sendvae_fast.evaluation.latent_space.view import VIEW_FOLDER, write_view
from sendvae_fast.evaluation.latent_views import (
    SIGHTS,
    FoundationTokens,
    Sight,
    foundation_tokens,
    pictures_to_view,
    view_latents,
)
from sendvae_fast.evaluation.origins import crop_size, weights_origin
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.probing.encoding import encoded_rows, feature_folder, posterior_means
from sendvae_fast.evaluation.probing.linear_fit import fit_linear
from sendvae_fast.evaluation.probing.rows import Rows
from sendvae_fast.evaluation.probing.scores import mean_with_interval
from sendvae_fast.evaluation.result import Measurement, Result
from sendvae_fast.evaluation.settings import LatentsConfig, Measure
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.sit.sizes import is_sequence
from sendvae_fast.progress import Progress


class Latents(NamedTuple):
    """Posterior means of pictures."""

    rows: Rows
    """Of C H W features."""
    shape: tuple[int, int, int]
    """C, H, W."""
    labels: np.ndarray
    """Classes int64 [n]."""

    def normalised(self, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        """float16 [n, C, H, W], of mean 0 and deviation 1 by channel if these are theirs."""
        found = np.empty((len(self.rows), *self.shape), np.float16)
        for place, block in self.rows.blocks():
            z = block.unflatten(1, self.shape).cpu().numpy()
            found[place] = (z - mean[:, None, None]) / std[:, None, None]
        return found

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each channel, float64 [C] twice."""
        sums = np.zeros((2, self.shape[0]))
        for _, block in self.rows.blocks():
            z = block.double().unflatten(1, self.shape)
            sums += np.stack([part.sum(dim=(0, 2, 3)).cpu().numpy() for part in (z, z.square())])
        mean, square = sums / (len(self.rows) * self.shape[1] * self.shape[2])
        return mean, np.sqrt(square - mean**2)


def evaluate_latents(config: LatentsConfig, say: Say = print) -> list[Result]:
    """Measure, and add the results to their file. Everything that is given is looked at before the work begins.

    Raises:
        UserError: pictures or weights are missing or broken, or there are too few pictures for a measure.
    """
    weights = resolve_weights(config.autoencoder)
    size = crop_size(config.image_size, weights)
    train, test = (CatalogPictures(Catalog.open(where), size) for where in (config.train_data, config.data))
    if "classes" in config.measures and train.catalog.class_names != test.catalog.class_names:
        raise UserError(
            f"{config.train_data} and {config.data} have different classes; leave `classes` out of measures"
        )
    if "uniformity" in config.measures:
        check_number(len(train))
    if "discrimination" in config.measures:
        sizes_for(min(len(train), config.discrimination.num_pictures), config.discrimination)
    ids, viewed = pictures_to_view(test, config.views)
    run, distributed = run_of(weights), init_distributed()
    out = config.results_file(run)
    autoencoder = load_autoencoder(weights).autoencoder.to(distributed.device)
    shape = autoencoder.latent_shape(size)
    left_out = _impossible(config, train, viewed, shape)
    if left_out and left_out.keys() == set(config.measures):
        raise UserError("; ".join(f"{measure} cannot be measured: {reason}" for measure, reason in left_out.items()))
    for measure, reason in left_out.items() if distributed.is_main else ():
        say(f"{measure} is left out: {reason}")
    config = replace(config, measures=tuple(name for name in config.measures if name not in left_out))
    foundation = None
    if config.foundation is not None and "patches" in config.measures:
        foundation = load_foundation(config.foundation)
    origin = weights_origin(weights, autoencoder)
    evaluation = Evaluation(weights={"autoencoder": origin}, pictures={"train": train.origin, "test": test.origin})
    with feature_folder(config.cache, distributed) as folder:
        latents, held_out = (
            Latents(
                encoded_rows(
                    posterior_means(autoencoder), origin.sha256, pictures, folder, config.batch_size, distributed
                ),
                shape,
                pictures.catalog.labels,
            )
            for pictures in (train, test)
        )
        measured = [_class_probe(latents, held_out, config, distributed)] if "classes" in config.measures else []
        tokens = None
        if foundation is not None and config.foundation is not None:
            tokens = foundation_tokens(foundation, config.foundation, viewed, folder, config.batch_size, distributed)
    if not distributed.is_main:
        return []  # the rest is for one rank; files stay readable, being mapped, though their folder is gone
    mean, std = latents.statistics()
    if not (std > 0).all():
        raise UserError("a channel of the latents is constant; the autoencoder's checkpoint is broken")
    measured += measure_latents(autoencoder, latents, held_out, mean, std, config)
    if set(SIGHTS) & set(config.measures):
        to_see = Latents(held_out.rows.take(ids), shape, viewed.catalog.labels).normalised(mean, std)
        measured += _views(to_see, viewed, tokens, config, None if run is None else run / VIEW_FOLDER)
    return evaluation.finish(measured, out, say)


def _impossible(
    config: LatentsConfig, train: CatalogPictures, viewed: CatalogPictures, shape: tuple[int, int, int]
) -> dict[Measure, str]:
    """The measures of `config` that these pictures, or latents of this shape, do not allow, and why."""
    found: dict[Measure, str] = {}
    if len(set(train.catalog.labels.tolist())) < 2:
        found["classes"] = f"the pictures in {config.train_data} are of one class"
    if not has_clusters(viewed.catalog.labels):
        found["clusters"] = f"it needs pictures of two classes, several of one, and those in {config.data} are not"
    if is_sequence(shape):
        found |= dict.fromkeys(("spectrum", "patches"), "it is of latents that are a grid, and these are a sequence")
    return {measure: reason for measure, reason in found.items() if measure in config.measures}


def measure_latents(
    autoencoder: ImageAutoencoder, train: Latents, test: Latents, mean: np.ndarray, std: np.ndarray,
    config: LatentsConfig,
) -> list[Measurement]:  # fmt: skip
    """The measures that are asked for, but for the class probe, which ranks share, and for what there is to see.

    Args:
        autoencoder: whose decoder is measured, too.
        train: latents.
        test: held-out latents.
        mean: of the training latents' channels [C], which latents are normalised by.
        std: their deviation.
        config: what to measure.

    Raises:
        UserError: there are too few pictures for a measure.
    """
    measured: list[Measurement] = []
    normalised = train.normalised(mean, std)
    if "uniformity" in config.measures:
        measured += _uniformity(normalised, config)
    if "discrimination" in config.measures:
        measured += _discrimination(normalised, config)
    if "spectrum" in config.measures:
        measured += _spectrum(normalised)
    if "sensitivity" in config.measures:
        measured += _sensitivity(autoencoder, test, std, config)
    if "learnability" in config.measures:
        measured += _learnability(normalised, test.normalised(mean, std), config, train.rows.device)
    return measured


def _class_probe(train: Latents, test: Latents, config: LatentsConfig, distributed: Distributed) -> Measurement:
    num_classes = int(train.labels.max()) + 1
    labels = torch.from_numpy(train.labels)
    model = fit_linear(train.rows, labels, num_classes, config.probe, "softmax", distributed)
    is_right = model.logits(test.rows).argmax(dim=1) == torch.from_numpy(test.labels)
    return _mean_of(
        "class_probe_accuracy", is_right.float(), {"train": len(train.rows), "test": len(test.rows)},
        f"multinomial logistic regression (C={config.probe.inverse_penalty:g}) on flattened posterior means",
        {"classes": num_classes},
    )  # fmt: skip


def _uniformity(normalised: np.ndarray, config: LatentsConfig) -> list[Measurement]:
    found, num_runs = uniformity(normalised, config.uniformity, config.seed), config.uniformity.num_runs
    protocol = f"lightningdit: t-SNE of a position a picture, density at the points, mean of {num_runs} runs"
    counts = {"pictures": min(len(normalised), config.uniformity.num_points)}
    metrics = {"uniformity_cv": found.variation, "uniformity_gini": found.gini, "uniformity_entropy": found.entropy}
    return [
        Measurement(
            metric=metric,
            value=float(values.mean()),
            interval=interval_over_runs(values.tolist()),
            interval_of="" if num_runs == 1 else "runs",
            protocol=protocol,
            counts=counts,
        )
        for metric, values in metrics.items()
    ]


def _discrimination(normalised: np.ndarray, config: LatentsConfig) -> list[Measurement]:
    found = discrimination(normalised.reshape(len(normalised), -1), config.discrimination, config.seed)
    dims, measured = config.discrimination.num_dims, []
    for size, nll in found.nll.items():
        remarks = []
        if found.explained < 0.9:
            remarks.append(f"the PCA keeps {found.explained:.0%} of the variance; the protocol asks for over 90%")
        if found.held_out_nll[size] > nll + 0.05 * dims:
            remarks.append(f"pictures that were not fitted have {found.held_out_nll[size]:.2f}: too few were fitted")
        measured.append(
            Measurement(
                metric=f"gmm_nll_{size}",
                value=nll,
                protocol=f"maetok: {size} Gaussians, nats a picture, on {dims} standardised principal components",
                counts={"pictures": found.num_pictures},
                remarks=tuple(remarks),
                details={"explained_variance": found.explained, "held_out": found.held_out_nll[size]},
            )
        )
    return measured


def _spectrum(normalised: np.ndarray) -> list[Measurement]:
    batches = (torch.from_numpy(normalised[start : start + 256]).float() for start in range(0, len(normalised), 256))
    shares = band_powers(batches)
    return [
        Measurement(
            metric="latent_high_frequency",
            value=float(shares[NUM_BANDS // 2 :].sum()),
            protocol="share of the normalised latents' power above half of the highest frequency along an axis",
            counts={"pictures": len(normalised)},
            details={"share_by_band": shares.tolist()},
        )
    ]


def _sensitivity(
    autoencoder: ImageAutoencoder, test: Latents, std: np.ndarray, config: LatentsConfig
) -> list[Measurement]:
    device = next(autoencoder.parameters()).device
    ids = np.unique(np.linspace(0, len(test.rows) - 1, min(len(test.rows), config.num_decoded)).astype(np.int64))
    rows = test.rows.take(ids)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with Progress("decoding with noise", len(rows), unit="picture") as progress:
            for place, block in rows.blocks():
                for part in torch.arange(place.start, place.stop).split(config.batch_size):
                    z = block[part - place.start].unflatten(1, test.shape).to(device)
                    yield torch.from_numpy(ids[part.numpy()]), z
                    progress.advance(len(part))

    scale = torch.from_numpy(std).float().to(device)
    found = decoder_sensitivity(autoencoder.decode, batches(), scale, config.seed)
    details = {f"noise {level:g}": float(values.mean()) for level, values in found.items()}
    protocol = "root mean square change of decoded pictures in [-1, 1] over the noise, 0.1 deviations of each channel"
    return [_mean_of("decoder_sensitivity", found[0.1], {"pictures": len(rows)}, protocol, details)]


def _learnability(
    train: np.ndarray, test: np.ndarray, config: LatentsConfig, device: torch.device
) -> list[Measurement]:
    small = config.learnability
    losses = velocity_loss_of_small_sit(train, test, small, config.seed, device)
    counts = {"train": len(train), "test": len(test)}
    protocol = (
        f"velocity loss of a SiT of {small.depth} x {small.width} after {small.num_steps} steps of {small.batch_size} "
        f"normalised latents, seed {config.seed}; white noise gives π/2 at best"
    )
    return [_mean_of("small_sit_velocity_loss", losses, counts, protocol, {})]


def _views(
    normalised: np.ndarray,
    viewed: CatalogPictures,
    tokens: FoundationTokens | None,
    config: LatentsConfig,
    in_run: Path | None,
) -> list[Measurement]:
    sights: list[Sight] = [sight for sight in SIGHTS if sight in config.measures]
    view, measured = view_latents(normalised, viewed, tokens, config.views, sights)
    folder = in_run if config.view is None else Path(config.view)
    if folder is not None:
        write_view(folder, view)
    return measured


def _mean_of(
    metric: str, values: Tensor, counts: dict[str, int], protocol: str, details: dict[str, float]
) -> Measurement:
    estimate = mean_with_interval(values)
    return Measurement(
        metric=metric,
        value=estimate.value,
        interval=estimate.interval,
        interval_of="test pictures",
        protocol=protocol,
        counts=counts,
        details=details,
    )
