"""A training run's settings, files and needs, looked at before it is begun; nothing is trained or written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.launch import adopt_slurm, read_place
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.latent_statistics import statistics_of_file
from sendvae_fast.plan.fake_step import TrainConfig
from sendvae_fast.plan.machines import machines_here
from sendvae_fast.plan.plan import Planner
from sendvae_fast.plan.words import plan_words
from sendvae_fast.train.e2e.repa_e_checkpoint import read_checkpoint
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.evaluation_settings import steps_between
from sendvae_fast.train.sit.latent_batches import TrainingLatents
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.networks import build_discriminator, initial_autoencoder
from sendvae_fast.train.vae.settings import VAETrainConfig

Look = tuple[str, Callable[[], object]]
"""What is looked at, and the loader that training opens it with."""


def dry_run(config: TrainConfig) -> int:
    """Open every file that a run needs, pretend its step on fake tensors, print the plan. Rank 0 does it alone.

    Raises:
        UserError: files are missing or no good; the message has all of them.
    """
    adopt_slurm()
    place = read_place()
    if place.rank > 0:
        return 0
    problems, seen = [], 1
    for what, look in looks(config):
        seen += 1
        try:
            look()
        except UserError as error:
            problems.append(f"{what}: {error}")
    machines = machines_here(place.world_size)
    try:
        print(f"{plan_words(Planner(config, machines).one(), machines)}\n")
    except UserError as error:
        problems.append(f"the step: {error}")
    if problems:
        print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
        raise UserError(
            f"{len(problems)} of {seen} things that the run needs are missing or no good (above): mend them, or give "
            "others; nothing was trained or written"
        )
    print(f"all {seen} things that the run needs are there; nothing was trained or written")
    return 0


def looks(config: TrainConfig) -> Iterator[Look]:
    """Everything that a run opens, by its setting."""
    if isinstance(config, SiTTrainConfig):
        yield from _looks_of_generator(config)
        return
    yield "data.root", lambda: _open_pictures(config.data.root)
    if config.init_from is not None:
        yield "init_from", lambda: initial_autoencoder(config, _scale(config))
    if config.loss.gan_weight > 0:
        yield "discriminator_from", lambda: build_discriminator(config, Distributed())
    perceptual = config.loss.perceptual
    if perceptual is not None:
        yield "loss.perceptual", lambda: Perceptual(perceptual)
    if isinstance(config, E2ETrainConfig):
        yield "repa.foundation", lambda: load_foundation(config.repa.foundation)
        for name, value, look in (
            ("generator_from", config.generator_from, resolve_weights),
            ("start_from", config.start_from, read_checkpoint),
        ):
            if value is not None:
                yield name, lambda look=look, value=value: look(value)
        return
    if config.alignment.lambda_align > 0:
        yield "alignment.foundation", lambda: load_foundation(config.alignment.foundation)
    yield from _looks_of_evaluation(config)


def _looks_of_generator(config: SiTTrainConfig) -> Iterator[Look]:
    yield "latents", lambda: _open_latents(config)
    if config.repa.weight > 0:
        yield "repa.foundation", lambda: load_foundation(config.repa.foundation)
    for name, value, look in (
        ("latent_stats", config.latent_stats, statistics_of_file),
        ("autoencoder", config.autoencoder, lambda path: load_autoencoder(resolve_weights(path))),
        ("init_from", config.init_from, resolve_weights),
    ):
        if value is not None:
            yield name, lambda look=look, value=value: look(value)
    yield from _looks_of_evaluation(config)


def _looks_of_evaluation(config: VAETrainConfig | SiTTrainConfig) -> Iterator[Look]:
    if steps_between(config.loop, config.evaluation) is not None:
        yield "evaluation.features", config.evaluation.features.check


def _scale(config: VAETrainConfig | E2ETrainConfig) -> float | None:
    """What training multiplies the latents of the weights to start from by; None for the statistics they bring."""
    if isinstance(config, VAETrainConfig) and config.alignment.latent_norm == "scale":
        return config.alignment.latent_scale
    return None


def _open_pictures(root: str | None) -> Catalog:
    if root is None:
        raise UserError("it is missing: give the photographs to train on, --data.root=FOLDER")
    return Catalog.open(root)


def _open_latents(config: SiTTrainConfig) -> TrainingLatents:
    """Latents, and with REPA the pictures that they must be of."""
    return TrainingLatents(
        config.latents,
        config.data,
        config.reader,
        with_images=config.repa.weight > 0,
        seed=config.seed,
        accumulation_steps=1,
        distributed=Distributed(),
    )
