"""`sendvae evaluate attributes`: how well a linear probe reads pictures' attributes off their latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.evaluation.job import Evaluation, Say
from sendvae_fast.evaluation.origins import crop_size, weights_origin
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.probing.attribute_probe import Labelled, ProbeScores, probe_attributes
from sendvae_fast.evaluation.probing.benchmarks import ProbeData, csv_data, open_benchmark
from sendvae_fast.evaluation.probing.encoding import Encode, encoded_rows, feature_folder, posterior_means
from sendvae_fast.evaluation.probing.rows import Rows, noise_rows
from sendvae_fast.evaluation.probing.scores import Estimate
from sendvae_fast.evaluation.result import Measurement, Result
from sendvae_fast.evaluation.settings import (
    AttributeDataConfig,
    AttributesConfig,
    ProbeConfig,
)
from sendvae_fast.models.autoencoder.storage import load_autoencoder


def open_data(config: AttributeDataConfig, image_size: int) -> ProbeData:
    """The pictures with their attributes. Raises UserError where they are missing or do not match."""
    if config.benchmark != "csv":
        return open_benchmark(config.benchmark, Path(config.data), image_size, config.split, config.seed)
    train, validation, test = (
        None if where is None else CatalogPictures(Catalog.open(where), image_size)
        for where in (config.train_data, config.validation_data, config.data)
    )
    assert train is not None and test is not None  # for type checkers: the config's __post_init__ saw to it
    return csv_data(train, test, validation, config.seed)


def evaluate_attributes(config: AttributesConfig, say: Say = print) -> list[Result]:
    """Measure, and add the results to their file. Everything that is given is looked at before the work begins.

    Raises:
        UserError: pictures, attributes or weights are missing or broken.
    """
    weights = resolve_weights(config.autoencoder)
    data = open_data(config, crop_size(config.image_size, weights))
    out = config.results_file(run_of(weights))
    distributed = init_distributed()
    autoencoder = load_autoencoder(weights).autoencoder.to(distributed.device)
    origin = weights_origin(weights, autoencoder)
    evaluation = Evaluation(
        weights={"autoencoder": origin},
        pictures={"train": data.train.pictures.origin, "test": data.test.pictures.origin},
    )
    with feature_folder(config.cache, distributed) as folder:
        measured = measure_attributes(
            posterior_means(autoencoder), origin.sha256, data, config.batch_size, folder, distributed,
            config.probe, seed=config.seed, control=config.control,
        )  # fmt: skip
    return evaluation.finish(measured, out, say) if distributed.is_main else []


def measure_attributes(
    encode: Encode,
    identity: str,
    data: ProbeData,
    batch_size: int,
    folder: Path,
    distributed: Distributed,
    config: ProbeConfig,
    *,
    seed: int = 0,
    control: bool = False,
) -> list[Measurement]:
    """F1 of linear probes of features, macro and micro, at 0.5 and at tuned thresholds.

    Args:
        encode: pictures to features, of any network.
        identity: what tells these features from others, such as the hash of the network's weights.
        data: the pictures, their attributes and the split.
        batch_size: pictures encoded at once.
        folder: where features are kept, see `encoded_rows`.
        distributed: the ranks; all must call.
        config: how probes are fitted.
        seed: of resamples and of the control's numbers.
        control: probe random numbers as well.

    Raises:
        UserError: features are not finite, or there is no room for them.
    """
    features = encoded_parts(encode, identity, data, batch_size, folder, distributed)
    measured = _measurements(fit_probes(features, data, config, seed, distributed), data, config)
    if control:
        noise = [noise_rows(rows, seed + number) for number, rows in enumerate(features)]
        measured += _measurements(fit_probes(noise, data, config, seed, distributed), data, config, of="_control")
    return measured


def encoded_parts(
    encode: Encode, identity: str, data: ProbeData, batch_size: int, folder: Path, distributed: Distributed
) -> list[Rows]:
    """The features of the training, the validation and the test pictures; arguments as for `measure_attributes`."""
    return [
        encoded_rows(encode, identity, part.pictures, folder, batch_size, distributed).take(part.ids)
        for part in (data.train, data.validation, data.test)
    ]


def fit_probes(
    features: Sequence[Rows], data: ProbeData, config: ProbeConfig, seed: int, distributed: Distributed
) -> ProbeScores:
    """Probes of features of the training, validation and test pictures."""
    parts = (data.train, data.validation, data.test)
    train, validation, test = (
        Labelled(rows, torch.from_numpy(part.values)) for rows, part in zip(features, parts, strict=True)
    )
    return probe_attributes(
        train, validation, test, data.names, config, top_k=data.top_k, seed=seed, distributed=distributed
    )


def _measurements(scores: ProbeScores, data: ProbeData, config: ProbeConfig, of: str = "") -> list[Measurement]:
    """The records of a probe; `of` is added to their names."""
    counts = {"train": len(data.train.ids), "validation": len(data.validation.ids), "test": len(data.test.ids)}
    fit = "random numbers" if of else "flattened posterior means"
    protocol = f"logistic regression (C={config.inverse_penalty:g}) on {fit}, split {data.split}"

    def record(metric: str, estimate: Estimate, how: str, details: Mapping[str, Any] | None = None) -> Measurement:
        return Measurement(
            metric=f"{metric}{of}",
            value=estimate.value,
            interval=estimate.interval,
            interval_of="test pictures",
            protocol=f"{protocol}, {how}",
            counts=counts,
            details=details or {},
        )

    def by_name(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(scores.names, values, strict=True))

    thresholds = by_name(scores.thresholds)
    records = [
        record("attribute_f1", scores.at_half.macro, "macro F1 at 0.5", {"f1": by_name(scores.at_half.each)}),
        record("attribute_f1_micro", scores.at_half.micro, "micro F1 at 0.5"),
        record(
            "attribute_f1_tuned",
            scores.tuned.macro,
            "macro F1 at tuned thresholds",
            {"f1": by_name(scores.tuned.each), "thresholds": thresholds},
        ),
        record("attribute_f1_tuned_micro", scores.tuned.micro, "micro F1 at tuned thresholds"),
    ]
    if scores.top_recall is not None:
        records.append(record(f"attribute_recall_top{data.top_k}", scores.top_recall, "share of all attributes found"))
    return records
