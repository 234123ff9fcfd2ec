"""One variant of the demo from its autoencoder to its numbers: fine-tune, encode, train a generator, draw, measure.

A variant works in a process of its own and notes in `parts.json` what is done, so that the demo can say how far it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.demo.pictures import spread
from sendvae_fast.demo.settings import (
    DemoConfig,
    Plan,
    cache_config,
    image_size,
    sample_config,
    sit_config,
    vae_config,
)
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.evaluation.attributes import measure_attributes
from sendvae_fast.evaluation.distribution_metrics import MetricName
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.evaluation.generation import measure_generation
from sendvae_fast.evaluation.job import Evaluation
from sendvae_fast.evaluation.origins import weights_origin
from sendvae_fast.evaluation.pictures import CatalogPictures, open_pictures
from sendvae_fast.evaluation.probing.benchmarks import csv_data
from sendvae_fast.evaluation.probing.encoding import posterior_means
from sendvae_fast.evaluation.probing.linear_fit import ProbeConfig
from sendvae_fast.evaluation.reconstruction import ReconstructionJob
from sendvae_fast.evaluation.reconstruction_protocols import PROTOCOLS
from sendvae_fast.evaluation.result import RESULTS_FILE
from sendvae_fast.files import write_atomic
from sendvae_fast.image_grid import save_grid
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.reading import count_in, last_json_line, numbers_in, read_json, reading
from sendvae_fast.sampling.sample_to_folder import sample_to_folder
from sendvae_fast.sampling.writer import PngFolder
from sendvae_fast.train.cache_latents import cache
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

PARTS = ("fine-tuning", "latents", "generator", "samples", "evaluation")
"""What is done for a variant, in this order; the plain one has no fine-tuning."""
NUM_STRIP = 10
"""Pictures in a strip of reconstructions."""
NUM_SHEET = 40
"""Pictures in a sheet of samples."""
BATCH_SIZE = 100
"""Pictures measured at once."""
METRICS: tuple[MetricName, ...] = ("frechet", "frechet_infinity", "precision_recall")
"""Of generated pictures."""


@dataclass(frozen=True)
class VariantJob:
    """A variant and where everything is."""

    config: DemoConfig
    plan: Plan
    root: Path
    train: Path
    test: Path

    def run(self) -> int:
        """Do what is missing; returns the exit code of a training that was stopped by a signal, else 0."""
        distributed = init_distributed()
        if self.plan.key != "plain":
            with self._part("fine-tuning") as codes:
                codes.append(train_vae(vae_config(self.config, self.plan, self.root, self.train)))
            if any(codes):
                return max(codes)
            draw_reconstructions(self.plan, self.root, self.test, distributed)
        with self._part("latents"):
            cache(cache_config(self.plan, self.root, self.train), distributed)
        with self._part("generator") as codes:
            codes.append(train_sit(sit_config(self.config, self.plan, self.root, self.train)))
        if any(codes):
            return max(codes)
        with self._part("samples"):
            sample_to_folder(sample_config(self.config, self.plan, self.root), distributed)
            samples = PngFolder(self.root / self.plan.key / "generated")
            sheet = next(samples.batches(samples.sample_ids()[:NUM_SHEET], NUM_SHEET))
            save_grid(self.root / f"{self.plan.key}_samples.png", sheet, columns=NUM_STRIP)
        if not results_path(self.root, self.plan).is_file():
            with self._part("evaluation"):
                self._measure(distributed)
        return 0

    @contextmanager
    def _part(self, name: str) -> Iterator[list[int]]:
        """Note that a part is done and how long it took, the first time it is. What is appended are exit codes."""
        start_s, codes = time.monotonic(), []
        yield codes
        taken = seconds_of_parts(self.root, self.plan)
        if name not in taken and not any(codes):
            taken[name] = round(time.monotonic() - start_s, 1)
            write_atomic(_parts_path(self.root, self.plan), json.dumps(taken) + "\n")

    def _measure(self, distributed: Distributed) -> None:
        """Write the results of the variant: of its autoencoder and of its generator's pictures."""
        config, folder, size = self.config, self.root / self.plan.key, image_size()
        train, test = (CatalogPictures(Catalog.open(where), size) for where in (self.train, self.test))
        samples = open_pictures(folder / "generated")
        network = FeaturesConfig(name=config.foundation.name, weights=config.foundation.weights).load(
            distributed.device
        )
        perceptual = None if config.perceptual is None else Perceptual(config.perceptual).to(distributed.device)
        weights = resolve_weights(folder / "vae")
        autoencoder = load_autoencoder(weights).autoencoder.to(distributed.device)
        evaluation = Evaluation(
            weights={"autoencoder": weights_origin(weights, autoencoder)},
            pictures={"train": train.origin, "test": test.origin, "samples": samples.origin},
        )
        reconstruction = ReconstructionJob(
            autoencoder=autoencoder,
            protocol=PROTOCOLS["adm"],
            network=network,
            perceptual=perceptual,
            batch_size=BATCH_SIZE,
        )
        measured = reconstruction.measure(test)
        if train.catalog.attributes is not None and test.catalog.attributes is not None:
            data = csv_data(train, test, None, config.seed)
            identity = evaluation.weights["autoencoder"].sha256
            encode, features = posterior_means(autoencoder), folder / "features"
            measured += measure_attributes(encode, identity, data, BATCH_SIZE, features, distributed, ProbeConfig())
        measured += measure_generation(samples, train, network, BATCH_SIZE, metrics=METRICS)
        evaluation.finish(measured, results_path(self.root, self.plan), say=lambda line: None)


def draw_reconstructions(plan: Plan, root: Path, test: Path, distributed: Distributed) -> None:
    """The strip of originals and what a plan's autoencoder makes of them, as PNG files in `root`."""
    strip = spread(Catalog.open(test), NUM_STRIP).to(distributed.device)
    autoencoder = load_autoencoder(resolve_weights(root / plan.key / "vae")).autoencoder.to(distributed.device)
    with torch.no_grad():
        decoded = to_uint8(autoencoder(to_model_range(strip)), "round")
    if plan.key == "plain":
        save_grid(root / "originals.png", strip, columns=len(strip))
    save_grid(root / f"{plan.key}_reconstructions.png", decoded, columns=len(decoded))


def entry_of(plan: Plan, root: Path) -> dict[str, Any]:
    """What there is of a variant so far, as `report.load_comparison` reads it."""
    entry: dict[str, Any] = {"name": plan.name, "description": plan.description}
    if results_path(root, plan).is_file():
        entry["evaluations"] = [f"{plan.key}/{RESULTS_FILE}"]
    for key in ("reconstructions", "samples"):
        if (root / f"{plan.key}_{key}.png").is_file():
            entry[key] = f"{plan.key}_{key}.png"
    runs = [f"{plan.key}/{stage}" for stage in ("vae", "sit")]
    entry["runs"] = [run for run in runs if last_step(root / run) > 0]
    return entry


def seconds_of_parts(root: Path, plan: Plan) -> dict[str, float]:
    """How long each part took that is done. UserError where the file that says so is damaged."""
    path, remedy = _parts_path(root, plan), "remove it and run the same command again"
    if not path.is_file():
        return {}
    seconds = read_json(path, remedy)
    with reading(path, remedy):
        return numbers_in(seconds)


def results_path(root: Path, plan: Plan) -> Path:
    """Where a variant's results are written."""
    return root / plan.key / RESULTS_FILE


def last_step(run: Path) -> int:
    """The last step in a run's metrics; 0 while there is none."""
    path, remedy = run / "metrics.jsonl", "repair or remove it"
    if not path.is_file():
        return 0
    with reading(path, remedy):
        last = last_json_line(path)
        return 0 if last is None else count_in(last, "step")


def _parts_path(root: Path, plan: Plan) -> Path:
    return root / plan.key / "parts.json"
