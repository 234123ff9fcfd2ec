"""How long a comparison takes: a guess from a measurement of this machine, mended by how fast the work then goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sendvae_fast.compare.plan import AUTOENCODER, EVALUATION, GENERATOR, LATENTS, SAMPLES, Comparison, Trial
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.sampling.settings import GenerateConfig
from sendvae_fast.train.e2e.settings import E2ETrainConfig

NUM_TIMED = 3
MAX_TIMED = 16
"""Pictures in a timed pass at most."""
# What work costs beside a bare forward and backward pass, measured on scenes of 64 px, with a GAN and REPA, on two
# cores of an AMD EPYC 9005 (CPU seconds over CPU seconds, so that other load on the machine does not count). va, reals
# and END_TO_END: guesses.
FROM_NOTHING = 1.4  # a training step of an autoencoder without discriminator and alignment, in its passes
STEP = {"none": 1.5, "send": 1.7, "va": 2.0, "reals": 1.6}  # with a discriminator, by alignment
END_TO_END = 1.7  # beside SIT_STEP
RENDERED, CACHED = 1.08, 0.144  # a picture, in the autoencoder's passes of a picture
EVALUATED = 0.6  # likewise, of 32 px; of 64 px 0.41
VIEWED_S = 0.0037  # seconds, of a picture in t-SNE and maps of alike patches, whatever the networks
START = 480  # a process's imports, likewise
SIT_STEP = 1.5  # a training step of a generator, in its passes
# A picture's sampler step with guidance, in the generator's passes of a picture, where bf16 is not emulated.
SAMPLED_STEP = {"bf16": 0.29, "tf32": 0.62, "fp32": 0.62}
GUIDED = 1.8  # what guidance costs in it
TWO_THREADS = 1.5  # how much faster an autoencoder trains on two or more cores
RANGE = (0.85, 1.4)
"""Of the guess: the range that is told."""
UNITS = (("day", 86_400.0), ("hour", 3_600.0), ("minute", 60.0))
NEAR_S = 43_200.0
MIN_ELAPSED_S = 20.0
"""Before so much has passed, the measurement says more than the work that was done."""


class Speed(NamedTuple):
    """Seconds of a picture's forward and backward pass on one core."""

    autoencoder_s: float
    generator_s: float


def measure_speed(comparison: Comparison) -> Speed:
    """Time a few passes of the first method's networks, on one thread; takes a second or two at the demo's sizes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trial = comparison.trials[0]
    autoencoder, batch = _autoencoder_of(trial)
    size = comparison.config.pictures.image_size
    sit = trial.generator_config
    shape = autoencoder.latent_shape(size)
    generator = SiT(sit.generator.build(shape, 2, None, sit.repa.block)).to(device)
    images = torch.zeros(min(batch, MAX_TIMED), 3, size, size, device=device)
    latents = torch.zeros(min(sit.data.global_batch, MAX_TIMED), *shape, device=device)
    times = torch.full((len(latents),), 0.5, device=device)
    labels = torch.zeros(len(latents), dtype=torch.long, device=device)
    autoencoder = autoencoder.to(device).train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Speed(
            _seconds(lambda: autoencoder(images).square().mean().backward()) / len(images),
            _seconds(lambda: generator(latents, times, labels)[0].square().mean().backward()) / len(latents),
        )
    finally:
        torch.set_num_threads(threads)


def _autoencoder_of(trial: Trial) -> tuple[ImageAutoencoder, int]:
    """A network of a trial's sizes, and the pictures in its training steps."""
    config = trial.autoencoder_config
    weights = trial.method.weights if config is None else config.init_from
    batch = MAX_TIMED if config is None else config.data.global_batch
    if weights is not None:
        return load_autoencoder(resolve_weights(weights)).autoencoder, batch
    assert config is not None  # a method has weights or a config
    return Autoencoder(config.autoencoder), batch


def _seconds(work: Callable[[], object]) -> float:
    """The median of `NUM_TIMED` runs after a first one; on a CPU what this thread takes of it, not what others do."""
    on_gpu, taken = torch.cuda.is_available(), []
    now = time.perf_counter if on_gpu else time.thread_time
    for _ in range(NUM_TIMED + 1):
        start_s = now()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(now() - start_s)
    return sorted(taken[1:])[NUM_TIMED // 2]


Part = tuple[str, str]
"""Whose part it is (a trial's name, or "" for the pictures, which are everybody's) and its name."""
PICTURES: Part = ("", "pictures")


def costs(comparison: Comparison, speed: Speed, num_train: int, num_test: int) -> dict[Part, float]:
    """Seconds of one core for every part, in the order in which they are done."""
    config = comparison.config
    rendered = num_train + num_test if config.pictures.data is None else 0
    found = {PICTURES: rendered * RENDERED * speed.autoencoder_s}
    for trial in comparison.trials:
        of_parts = {
            LATENTS: (START + num_train * CACHED) * speed.autoencoder_s,
            GENERATOR: _generator_cost(trial, speed),
            SAMPLES: config.samples.num_samples * _drawn_cost(config.samples, speed),
            EVALUATION: (num_train + num_test + config.samples.num_samples) * EVALUATED * speed.autoencoder_s
            + min(config.views.num_pictures, num_test) * VIEWED_S,
        }
        if trial.method.weights is None:
            of_parts[trial.parts[0]] = _autoencoder_cost(trial, speed)
        found |= {(trial.name, part): of_parts[part] for part in trial.parts}
    return found


def _autoencoder_cost(trial: Trial, speed: Speed) -> float:
    config = trial.autoencoder_config
    assert config is not None  # it is trained
    if isinstance(config, E2ETrainConfig):
        step_s = END_TO_END * speed.autoencoder_s + SIT_STEP * speed.generator_s
    elif config.alignment.method == "none" and not config.loss.gan_weight:
        step_s = FROM_NOTHING * speed.autoencoder_s
    else:
        step_s = STEP[config.alignment.method] * speed.autoencoder_s
    return config.loop.num_steps * config.data.global_batch * step_s


def _generator_cost(trial: Trial, speed: Speed) -> float:
    config, curve, every = trial.generator_config, trial.config.curve, trial.config.curve_every
    training_s = config.loop.num_steps * config.data.global_batch * SIT_STEP * speed.generator_s
    if every is None:
        return training_s
    num_points = -(-config.loop.num_steps // every)
    return training_s + num_points * curve.num_samples * (
        _drawn_cost(curve, speed) + EVALUATED * speed.autoencoder_s
    )  # fmt: skip


def _drawn_cost(config: GenerateConfig, speed: Speed) -> float:
    """Of a picture."""
    step_s = SAMPLED_STEP[config.precision] * speed.generator_s / (1.0 if config.guidance_scale > 1 else GUIDED)
    return config.sampler.num_steps * step_s


def finish_times(parts: Mapping[Part, float], cores: int, num_workers: int) -> dict[Part, float]:
    """Seconds from now at which each part ends that still costs `parts` seconds of a core.

    First come the pictures, on all cores, and the autoencoders that start from no other, one after another on two. Then
    every trial goes through its parts, `num_workers` at a time, sharing the cores equally.
    """
    now, ends = 0.0, {}
    for part, cost in parts.items():
        if part == PICTURES or part[1] == AUTOENCODER:
            now += cost / (cores if part == PICTURES else min(float(cores), TWO_THREADS))
            ends[part] = now
    chains = [[part for part in parts if part[0] == owner] for owner in dict.fromkeys(key for key, _ in parts)]
    chains = [[part for part in chain if part not in ends] for chain in chains]
    chains = [chain for chain in chains if chain]
    left = dict(parts)
    while chains:
        active = chains[:num_workers]
        rate = min(1.0, cores / len(active))
        passed = min(left[chain[0]] for chain in active)
        now += passed / rate
        for chain in active:
            left[chain[0]] -= passed
            if left[chain[0]] <= 1e-9:
                ends[chain.pop(0)] = now
        chains = [chain for chain in chains if chain]
    return ends


@dataclass
class Timeline:
    """What is done, what is to come, and when."""

    costs: Mapping[Part, float]
    num_workers: int
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    _start_s: float = 0.0
    _before: Mapping[Part, float] = field(default_factory=dict)

    def begin(self, done: Mapping[Part, float]) -> None:
        """The work goes on from `done`: what an earlier call did says nothing about the speed of this one."""
        self._start_s, self._before = time.monotonic(), dict(done)

    def total_range_s(self) -> tuple[float, float]:
        """How long all of it takes on this machine, from a measurement alone: at least and at most, in seconds."""
        total = max(finish_times(self.costs, self.cores, self.num_workers).values())
        return RANGE[0] * total, RANGE[1] * total

    def remaining_s(self, done: Mapping[Part, float]) -> dict[Part, float]:
        """Seconds until each part is done that is not. done: 0 to 1 for every part.

        After `MIN_ELAPSED_S` the guess is scaled by how much longer or shorter the work since `begin` has taken than it
        should have.
        """
        left = {part: cost * (1 - done.get(part, 0.0)) for part, cost in self.costs.items()}
        ends = finish_times(left, self.cores, self.num_workers)
        at_start = {part: cost * (1 - self._before.get(part, 0.0)) for part, cost in self.costs.items()}
        expected_s = max(finish_times(at_start, self.cores, self.num_workers).values()) - max(ends.values())
        elapsed_s = time.monotonic() - self._start_s
        scale = elapsed_s / expected_s if elapsed_s > MIN_ELAPSED_S and expected_s > 0 else 1.0
        return {part: scale * end for part, end in ends.items() if done.get(part, 0.0) < 1}


def in_words(range_s: Sequence[float]) -> str:
    """A range of seconds as "6 to 9 minutes", a longer one in hours or days."""
    unit, length_s = next((unit for unit in UNITS if range_s[0] >= 2 * unit[1]), UNITS[-1])
    low, high = (max(1, round(seconds / length_s)) for seconds in range_s)
    return f"{low} to {high} {unit}s" if low != high else f"about a {unit}" if high == 1 else f"about {high} {unit}s"


def clock(seconds: float) -> str:
    """The time of day in so many seconds, with the day where it is not near."""
    when = time.localtime(time.time() + seconds)
    return time.strftime("%H:%M" if seconds < NEAR_S else "%a %d %b, %H:%M", when)
