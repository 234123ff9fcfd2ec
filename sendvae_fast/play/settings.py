"""The settings of `sendvae play`, and the networks that they name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from sendvae_fast import checks
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.job import Say
from sendvae_fast.evaluation.origins import crop_size
from sendvae_fast.evaluation.probing.benchmarks import Benchmark, open_benchmark
from sendvae_fast.evaluation.probing.directions import Direction
from sendvae_fast.play.networks import LabelledPictures, RunNetworks
from sendvae_fast.play.places import find_runs


@dataclass(kw_only=True)
class PlayConfig:
    """The runs, where attributes come from, and where the page is. Raises `UserError` for a value out of range."""

    runs: tuple[str, ...]
    """Runs of stage 1 or 2, weights of autoencoders, or a demo's folder; several are shown side by side."""
    autoencoder: str | None = None
    """Of generators whose run does not name theirs."""
    image_size: int | None = None
    """Side of the ADM centre crop in pixels; by default that of the autoencoder's run."""
    attributes: str | None = None
    """Pictures with attributes that the sliders move; by default those that a run was trained on, if they have an
    attributes.csv."""
    benchmark: Benchmark = "csv"
    """How `attributes` is laid out, as of `evaluate attributes`."""
    direction: Direction = "pattern"
    """Of the sliders, as of `evaluate traversals`."""
    num_pictures: int = 2000
    """Pictures at most that an attribute's direction is taken from, when a slider is first moved."""
    host: str = "127.0.0.1"
    """Address to listen at. The default serves this machine alone; 0.0.0.0 serves whoever can reach it."""
    port: int = 7860
    """Port to listen at; 0 for any free one."""

    def __post_init__(self) -> None:
        checks.choices(self)
        checks.at_least(1, self, "image_size", "num_pictures")
        checks.in_interval("[0, 65535]", self, "port")
        if not self.runs:
            raise UserError("runs is empty: name one or more runs")
        if self.benchmark != "csv" and self.attributes is None:
            raise UserError(f"benchmark={self.benchmark} goes with --attributes, the folder that it lies in")


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
