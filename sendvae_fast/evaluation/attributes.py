"""`sendvae evaluate attributes`: how well a linear probe reads pictures' attributes off their latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sendvae_fast import checks
from sendvae_fast.data.attributes import Attributes
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.attribute_probe import probe_attributes
from sendvae_fast.evaluation.job import Evaluation, EvaluationConfig, Say
from sendvae_fast.evaluation.origins import crop_size, weights_origin
from sendvae_fast.evaluation.pictures import CatalogPictures, Pictures
from sendvae_fast.evaluation.result import Measurement, Result
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder, Posterior
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.progress import Progress


@dataclass(kw_only=True)
class AttributesConfig(EvaluationConfig):
    """The autoencoder, and the pictures with their attributes."""

    autoencoder: str
    """Autoencoder folder or run."""
    train_data: str
    """Pictures with an attributes.csv that the probes are trained on."""
    data: str
    """Pictures with an attributes.csv that the probes are scored on."""
    image_size: int | None = None
    """Side of the ADM centre crop in pixels; by default that of the autoencoder's run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "image_size")


def evaluate_attributes(config: AttributesConfig, say: Say = print) -> list[Result]:
    """Measure, and add the results to their file. Everything that is given is looked at before the work begins.

    Raises:
        UserError: pictures, attributes or weights are missing or broken.
    """
    weights = resolve_weights(config.autoencoder)
    size = crop_size(config.image_size, weights)
    train, test = (CatalogPictures(Catalog.open(root), size) for root in (config.train_data, config.data))
    for pictures in (train, test):
        attributes_of(pictures)
    out = config.results_file(run_of(weights))
    autoencoder = load_autoencoder(weights).autoencoder.to(init_distributed().device)
    evaluation = Evaluation(
        weights={"autoencoder": weights_origin(weights, autoencoder)},
        pictures={"train": train.origin, "test": test.origin},
    )
    return evaluation.finish(measure_attributes(autoencoder, train, test, config.batch_size), out, say)


def measure_attributes(
    autoencoder: Autoencoder, train: CatalogPictures, test: CatalogPictures, batch_size: int
) -> list[Measurement]:
    """Mean F1 of linear probes from flattened posterior means to the catalogs' attributes, and each one's."""
    tables = [attributes_of(pictures) for pictures in (train, test)]
    latents = [flat_latents(autoencoder, pictures, batch_size) for pictures in (train, test)]
    values = [torch.from_numpy(table.values).to(latents[0].device) for table in tables]
    probe = probe_attributes(latents[0], values[0], latents[1], values[1], tables[0].names)
    return [
        Measurement(
            metric="attribute_f1",
            value=probe.mean_f1,
            protocol="logistic regression on posterior means, macro F1 at 0.5",
            counts={"train": len(train), "test": len(test)},
            details={"f1": dict(zip(probe.names, probe.f1, strict=True))},
        )
    ]


def attributes_of(pictures: CatalogPictures) -> Attributes:
    """The attributes of pictures. Raises UserError if there are none."""
    if pictures.catalog.attributes is None:
        raise UserError(f"{pictures.catalog.root} has no attributes.csv; probing needs one in both folders")
    return pictures.catalog.attributes


@torch.no_grad()
def flat_latents(autoencoder: Autoencoder, pictures: Pictures, batch_size: int) -> Tensor:
    """Flattened posterior means [N, C H W] of pictures, on the autoencoder's device."""
    device, means = next(autoencoder.parameters()).device, []
    with Progress("encoding", len(pictures), unit="picture") as progress:
        for images in pictures.batches(batch_size):
            moments = autoencoder.encode(to_model_range(images.to(device)))
            means.append(Posterior.from_moments(moments).mean.flatten(1))
            progress.advance(len(images))
    return torch.cat(means)
