"""The networks of the runs that `sendvae play` shows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.job import Say
from sendvae_fast.evaluation.origins import crop_size
from sendvae_fast.evaluation.probing.benchmarks import open_benchmark
from sendvae_fast.play.networks import LabelledPictures, RunNetworks
from sendvae_fast.play.places import find_runs
from sendvae_fast.play.settings import PlayConfig


def load_runs(config: PlayConfig, device: torch.device, say: Say = print) -> list[RunNetworks]:
    """The networks of all runs, on a device; `say` is told what cannot be done with one.

    Raises:
        UserError: a path is no run, weights are broken, or what was given as attributes has none.
    """
    labelled, opened = cache(lambda size: _given_attributes(config, size)), cache(Catalog.open)
    networks = []
    for places in find_runs(config.runs, config.autoencoder):
        size = config.image_size or places.image_size or crop_size(None, places.autoencoder)
        catalog, known = None, None if config.attributes is None else labelled(size)
        try:
            catalog = None if places.pictures is None else opened(places.pictures)
        except UserError as error:
            say(f"note: {places.name}: its pictures cannot be shown: {error}")
        if known is None and catalog is not None and catalog.attributes is not None:
            known = _labelled(catalog, catalog.attributes.values, catalog.attributes.names, config.num_pictures)
        if known is None:
            say(f"note: {places.name}: nothing is known of attributes, so none can be moved; --attributes names some")
        networks.append(
            RunNetworks(places, size, device, catalog or (known and known.catalog), known, config.direction)
        )
    return networks


def _given_attributes(config: PlayConfig, image_size: int) -> LabelledPictures:
    where = str(config.attributes)
    if config.benchmark == "csv":
        catalog = Catalog.open(where)
        if catalog.attributes is None:
            raise UserError(f"{where} has no attributes.csv: give pictures with one as --attributes")
        return _labelled(catalog, catalog.attributes.values, catalog.attributes.names, config.num_pictures)
    data = open_benchmark(config.benchmark, Path(where), image_size, "random", seed=0)
    part = data.train
    return _labelled(part.pictures.catalog.subset(part.ids), part.values, data.names, config.num_pictures)


def _labelled(catalog: Catalog, values: np.ndarray, names: tuple[str, ...], num_pictures: int) -> LabelledPictures:
    """Some pictures from all over a catalog."""
    chosen = np.linspace(0, len(catalog) - 1, min(num_pictures, len(catalog))).astype(np.int64)
    return LabelledPictures(catalog.subset(chosen), values[chosen].astype(np.uint8), names)
