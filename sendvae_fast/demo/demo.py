"""The demo: everything the project does, end to end, small enough for two CPU cores, ending in a report.

    pictures -> plain autoencoder -> fine-tuned twice with equal steps: control (no alignment) and Send-VAE
             -> for each of the three: latent cache -> SiT with REPA -> samples -> evaluation   -> report.html

Every part is an ordinary run in its own folder, so an interrupted demo goes on where it stopped and a finished one only
writes its report again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.config import CONFIGS, build_config, merge, read_yaml
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.indexing.index import CATALOG_SUFFIX
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.demo.workers import count_generators, count_steps, side_by_side
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run import plain
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.evaluate import Evaluator
from sendvae_fast.image_grid import save_grid
from sendvae_fast.losses.perceptual import PerceptualConfig
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.config import FoundationConfig
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.report import load_report, write_report
from sendvae_fast.sampling.generate import GenerateConfig
from sendvae_fast.sampling.sample_to_folder import SampleConfig, sample_to_folder
from sendvae_fast.sampling.samplers import SamplerConfig
from sendvae_fast.sampling.writer import PngFolder
from sendvae_fast.train.cache_latents import CacheConfig, cache
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.settings import VAETrainConfig
from sendvae_fast.train.vae.stage import train_vae

HELD_OUT_EVERY = 5
"""Of a user's own photographs every fifth of a class is held out for evaluation."""
NUM_STRIP = 10
"""Pictures in a strip of reconstructions."""
NUM_SHEET = 40
"""Pictures in a sheet of samples."""


@dataclass(frozen=True)
class Plan:
    """One way of training the autoencoder."""

    key: str
    name: str
    description: str
    config: str


PLANS = (
    Plan("plain", "Plain VAE", "The starting point: no alignment, no fine-tuning.", "vae.yaml"),
    Plan("control", "Control", "The plain VAE fine-tuned without alignment, for as many steps.", "vae_control.yaml"),
    Plan("send", "Send-VAE", "The plain VAE fine-tuned with alignment through noise and mapper.", "vae_send.yaml"),
)


@dataclass(kw_only=True)
class DemoConfig:
    """How much of everything. The defaults took 12.5 minutes on two CPU cores."""

    run: str = "runs/demo"
    """Folder of the demo; the same command again goes on in it."""
    data: str | None = None
    """Your own photographs, anything `Catalog.open` takes; without it the demo renders scenes with known attributes."""
    seed: int = 0
    """Seed of training and sampling; the rendered scenes stay the same."""
    num_train_images: int = 4000
    """Rendered scenes to train on."""
    num_test_images: int = 1000
    """Rendered scenes held out for evaluation."""
    vae_steps: int = 600
    """Steps of the plain autoencoder."""
    finetune_steps: int = 1500
    """Steps of each fine-tuning."""
    generator_steps: int = 1500
    """Steps of each SiT."""
    foundation: FoundationConfig = field(default_factory=lambda: FoundationConfig(name="demo"))
    """The frozen foundation model, for alignment, REPA and the Fréchet distances."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and weights, for the table; without it LPIPS is not measured."""
    generate: GenerateConfig = field(
        default_factory=lambda: GenerateConfig(
            num_samples=240,
            batch_size=80,
            guidance_scale=2.0,
            guidance_interval=(0.0, 0.8),
            labels="equal",
            sampler=SamplerConfig(num_steps=40),
        )
    )
    """How pictures are drawn."""


def run_demo(config: DemoConfig) -> int:
    """Run or finish the demo; returns the exit code."""
    root = Path(config.run)
    timer = Timer(num_parts=6)
    plain_vae, *fine_tuned = PLANS
    with side_by_side() as workers:
        with timer.part("pictures"):
            train_data, test_data = prepare_pictures(config, root)
        with timer.part("plain autoencoder"):
            codes = [train_vae(vae_config(config, plain_vae, root, train_data))]
        if any(codes):
            return max(codes)
        with timer.part("autoencoders with and without alignment"):
            configs = [vae_config(config, plan, root, train_data) for plan in fine_tuned]
            codes = workers.run(train_vae, configs, count_steps(configs), "fine-tuning", "step")
        if any(codes):
            return max(codes)
        with timer.part("generators on the latents of each"):
            jobs = [
                GeneratorJob(
                    cache_config(plan, root, train_data),
                    sit_config(config, plan, root, train_data),
                    sample_config(config, plan, root),
                )
                for plan in PLANS
            ]
            codes = workers.run(GeneratorJob.run, jobs, count_generators(jobs), "generators", "steps and pictures")
        if any(codes):
            return max(codes)
    with timer.part("evaluation"):
        results = measure(config, root, Catalog.open(train_data), Catalog.open(test_data))
    with timer.part("report"):
        results["notes"].append(timer.sentence())
        (root / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        write_report(root / "report.html", load_report(root))
    print_summary(results)
    print(f"report: {root / 'report.html'}")
    return 0


@dataclass(frozen=True)
class GeneratorJob:
    """What follows an autoencoder: its latents, a generator on them, pictures from it."""

    cache: CacheConfig
    sit: SiTTrainConfig
    sample: SampleConfig

    def run(self) -> int:
        """Do it all; returns the exit code of the training."""
        distributed = init_distributed()
        cache(self.cache, distributed)
        code = train_sit(self.sit)
        if code == 0:
            sample_to_folder(self.sample, distributed)
        return code


# -- what each part is given -----------------------------------------------------------------------------------------


def image_size() -> int:
    """Side of the demo's pictures."""
    return read_yaml(CONFIGS / "demo" / "vae.yaml")["data"]["image_size"]


def vae_config(config: DemoConfig, plan: Plan, root: Path, train_data: Path) -> VAETrainConfig:
    """Stage 1 of a plan: the plain autoencoder from scratch, the others from it."""
    is_plain = plan.key == "plain"
    settings: dict[str, Any] = {
        "run": str(root / plan.key / "vae"),
        "seed": config.seed,
        "data": {"root": str(train_data)},
        "loop": {"num_steps": config.vae_steps if is_plain else config.finetune_steps},
        "alignment": {"foundation": plain(config.foundation)},
    }
    if not is_plain:
        settings["init_from"] = str(root / "plain" / "vae")
    return build_config(VAETrainConfig, merge(read_yaml(CONFIGS / "demo" / plan.config), settings), plan.config)


def cache_config(plan: Plan, root: Path, train_data: Path) -> CacheConfig:
    """The latent cache of a plan."""
    return CacheConfig(
        out=str(root / plan.key / "latents"),
        autoencoder=str(root / plan.key / "vae"),
        data=str(train_data),
        image_size=image_size(),
    )


def sit_config(config: DemoConfig, plan: Plan, root: Path, train_data: Path) -> SiTTrainConfig:
    """Stage 2 of a plan: the same for all but for the latents."""
    settings = {
        "run": str(root / plan.key / "sit"),
        "seed": config.seed,
        "data": {"root": str(train_data)},
        "latents": str(root / plan.key / "latents"),
        "autoencoder": str(root / plan.key / "vae"),
        "loop": {"num_steps": config.generator_steps},
        "repa": {"foundation": plain(config.foundation)},
    }
    return build_config(SiTTrainConfig, merge(read_yaml(CONFIGS / "demo" / "sit.yaml"), settings), "sit.yaml")


def sample_config(config: DemoConfig, plan: Plan, root: Path) -> SampleConfig:
    """The samples of a plan."""
    return SampleConfig(
        **vars(replace(config.generate, seed=config.seed)),
        generator=str(root / plan.key / "sit"),
        autoencoder=str(root / plan.key / "vae"),
        out=str(root / plan.key / "generated"),
    )


# -- pictures --------------------------------------------------------------------------------------------------------


def prepare_pictures(config: DemoConfig, root: Path) -> tuple[Path, Path]:
    """Where the training and the held-out pictures are: rendered scenes, or catalogs of the user's photographs."""
    train, test = root / "data" / "train", root / "data" / "test"
    if config.data is None:
        synth_scenes(train, config.num_train_images, image_size(), seed=0)
        synth_scenes(test, config.num_test_images, image_size(), seed=1)
    else:
        train, test = (path.with_name(path.name + CATALOG_SUFFIX) for path in (train, test))
        split_photographs(Catalog.open(config.data), train, test)
    return train, test


def split_photographs(catalog: Catalog, train: Path, test: Path) -> None:
    """Write the catalogs of both parts: of every class, every `HELD_OUT_EVERY`th picture is held out.

    Raises UserError when that leaves nothing to train on or nothing to test with.
    """
    held_out = np.zeros(len(catalog), bool)
    for label in range(len(catalog.class_names)):
        held_out[np.flatnonzero(catalog.labels == label)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    if min(held_out.sum(), (~held_out).sum()) < 2:
        raise UserError(
            f"{catalog.root} has too few pictures for the demo: give classes of at least {HELD_OUT_EVERY} pictures, "
            f"and at least two such classes"
        )
    train.parent.mkdir(parents=True, exist_ok=True)
    catalog.subset(np.flatnonzero(~held_out)).save(train)
    catalog.subset(np.flatnonzero(held_out)).save(test)


# -- results ---------------------------------------------------------------------------------------------------------


def measure(config: DemoConfig, root: Path, train: Catalog, test: Catalog) -> dict[str, Any]:
    """All metrics of all plans and their pictures, as `report.load_comparison` reads them."""
    device = init_distributed().device
    evaluator = Evaluator(config.foundation, config.perceptual, image_size(), 100, device)
    strip = spread(test, NUM_STRIP).to(device)
    save_grid(root / "originals.png", strip, columns=len(strip))
    entries = [_measure_plan(plan, evaluator, root, train, test, strip) for plan in PLANS]
    source = "rendered scenes" if config.data is None else f"photographs from {config.data}"
    pictures = f"{len(train):,} {source} to train on, {len(test):,} held out"
    return {
        "title": "sendvae_fast demo",
        "subtitle": f"{pictures}, {image_size()} px, seed {config.seed}",
        "candidate": "Send-VAE",
        "control": "Control",
        "originals": "originals.png",
        "variants": entries,
        "notes": [
            (
                f"Control and Send-VAE start from the same plain VAE and take {config.finetune_steps:,} steps each; "
                f"every generator takes {config.generator_steps:,} steps. Distances are Fréchet distances between "
                f"features of the foundation model ({config.foundation.name}): they compare the columns of this page "
                f"with each other, not with published FIDs."
            ),
            "One seed is an anecdote: run the demo with other seeds before believing a small difference.",
        ],
    }


def spread(catalog: Catalog, num: int) -> Tensor:
    """`num` pictures from all over a catalog, so from many classes: uint8 [num, 3, S, S]."""
    loader, step = ImageLoader(catalog, image_size()), max(len(catalog) // num, 1)
    return torch.cat([next(loader.in_order(1, start=i)).images for i in range(0, len(catalog), step)][:num])


def _measure_plan(
    plan: Plan, evaluator: Evaluator, root: Path, train: Catalog, test: Catalog, strip: Tensor
) -> dict[str, Any]:
    autoencoder = load_autoencoder(resolve_weights(root / plan.key / "vae")).autoencoder.to(evaluator.device)
    samples = PngFolder(root / plan.key / "generated")
    metrics: dict[str, float | None] = evaluator.reconstruction(autoencoder, test)
    attribute_f1: dict[str, float] = {}
    if train.attributes is not None and test.attributes is not None:
        probe = evaluator.attributes(autoencoder, train, test)
        metrics["attribute_f1"] = probe.mean_f1
        attribute_f1 = dict(zip(probe.names, probe.f1, strict=True))
    metrics["gfid"] = evaluator.generation(samples, train)
    with torch.no_grad():
        decoded = to_uint8(autoencoder(to_model_range(strip)), "round")
    save_grid(root / f"{plan.key}_reconstructions.png", decoded, columns=len(decoded))
    sheet = next(samples.batches(samples.sample_ids()[:NUM_SHEET], NUM_SHEET))
    save_grid(root / f"{plan.key}_samples.png", sheet, columns=NUM_STRIP)
    return {
        "name": plan.name,
        "description": plan.description,
        "metrics": metrics,
        "attribute_f1": attribute_f1,
        "reconstructions": f"{plan.key}_reconstructions.png",
        "samples": f"{plan.key}_samples.png",
        "runs": [f"{plan.key}/vae", f"{plan.key}/sit"],
    }


def print_summary(results: dict[str, Any], say: Callable[[str], object] = print) -> None:
    """The table of metrics as plain text."""
    columns = [entry["name"] for entry in results["variants"]]
    say(f"{'':14s}" + "".join(f"{name:>14s}" for name in columns))
    for metric in results["variants"][0]["metrics"]:
        values = [entry["metrics"][metric] for entry in results["variants"]]
        say(f"{metric:14s}" + "".join(f"{'-':>14s}" if value is None else f"{value:14.3f}" for value in values))


class Timer:
    """Says which part is running and keeps how long each took."""

    def __init__(self, num_parts: int) -> None:
        self.num_parts, self.seconds = num_parts, {}

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Announce a part and time it."""
        print(f"[{len(self.seconds) + 1}/{self.num_parts}] {title}", file=sys.stderr, flush=True)
        start_s = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - start_s

    def sentence(self) -> str:
        """The total time of this process, for the report."""
        return (
            f"This command took {sum(self.seconds.values()) / 60:.1f} minutes on {len(os.sched_getaffinity(0))} cores "
            "(parts that were there already count as nothing)."
        )
