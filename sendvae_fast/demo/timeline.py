"""How long the demo takes: a guess from a measurement of this machine, mended by how fast the work then goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sendvae_fast.config import CONFIGS, build_config, read_config
from sendvae_fast.demo.settings import DemoConfig
from sendvae_fast.demo.variant import PARTS
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.settings import VAETrainConfig

NUM_TIMED = 3
# What work costs beside a bare forward and backward pass, measured on two cores of an AMD EPYC 9005 (CPU seconds over
# CPU seconds, so that other load on the machine does not count).
PLAIN_STEP, CONTROL_STEP, SEND_STEP = 1.4, 1.5, 1.7  # a training step, in passes of the autoencoder
RENDERED, CACHED, EVALUATED = 0.09, 0.012, 0.045  # a picture, in passes of the autoencoder
START = 40  # a process's imports, in passes of the autoencoder
SIT_STEP = 1.5  # a training step, in passes of the generator
SAMPLED_STEP = {"bf16": 0.018, "tf32": 0.039, "fp32": 0.039}  # a picture's sampler step, where bf16 is not emulated
TWO_THREADS = 1.5  # how much faster the plain autoencoder trains on two or more cores
RANGE = (0.85, 1.4)
"""Of the guess: the range that is told."""
MIN_ELAPSED_S = 20.0
"""Before so much has passed, the measurement says more than the work that was done."""


class Speed(NamedTuple):
    """Seconds of a forward and backward pass on one core."""

    autoencoder_s: float
    generator_s: float


def measure_speed() -> Speed:
    """Time a few passes of the demo's networks, at the demo's batch sizes, on one thread; takes a second or two."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = build_config(VAETrainConfig, read_config(CONFIGS / "demo" / "vae.yaml") | {"run": "none"})
    sit = build_config(SiTTrainConfig, read_config(CONFIGS / "demo" / "sit.yaml") | {"run": "none", "latents": "none"})
    autoencoder = Autoencoder(vae.autoencoder).to(device)
    images = torch.zeros(vae.data.global_batch, 3, vae.data.image_size, vae.data.image_size, device=device)
    size = vae.data.image_size // autoencoder.config.downsampling
    shape = (vae.autoencoder.latent_channels, size, size)
    generator = SiT(sit.generator.build(shape, 2, None, sit.repa.block)).to(device)
    latents = torch.zeros(sit.data.global_batch, *shape, device=device)
    times = torch.full((len(latents),), 0.5, device=device)
    labels = torch.zeros(len(latents), dtype=torch.long, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Speed(
            _seconds(lambda: autoencoder(images).square().mean().backward()),
            _seconds(lambda: generator(latents, times, labels)[0].square().mean().backward()),
        )
    finally:
        torch.set_num_threads(threads)


def _seconds(work: Callable[[], object]) -> float:
    """The median of `NUM_TIMED` runs after a first one."""
    taken = []
    for _ in range(NUM_TIMED + 1):
        start_s = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start_s)
    return sorted(taken[1:])[NUM_TIMED // 2]


Part = tuple[str, str]
"""Whose part it is ("demo", or a plan's key) and its name."""


def costs(config: DemoConfig, speed: Speed, num_train: int, num_test: int) -> dict[Part, float]:
    """Seconds of one core for every part, in the order in which they are done."""
    vae, sit = speed.autoencoder_s, speed.generator_s
    rendered = num_train + num_test if config.data is None else 0
    found = {
        ("demo", "pictures"): rendered * RENDERED * vae,
        ("demo", "plain autoencoder"): config.vae_steps * PLAIN_STEP * vae,
    }
    num_samples, sampler_steps = config.generate.num_samples, config.generate.sampler.num_steps
    shared = {
        "latents": (START + num_train * CACHED) * vae,
        "generator": config.generator_steps * SIT_STEP * sit,
        "samples": num_samples * sampler_steps * SAMPLED_STEP[config.generate.precision] * sit,
        "evaluation": (num_train + num_test + num_samples) * EVALUATED * vae,
    }
    for key, step in (("plain", 0.0), ("control", CONTROL_STEP), ("send", SEND_STEP)):
        own = {"fine-tuning": config.finetune_steps * step * vae} if step else {}
        found |= {(key, name): (own | shared)[name] for name in PARTS if name in own | shared}
    return found


def finish_times(parts: Mapping[Part, float], cores: int, num_workers: int) -> dict[Part, float]:
    """Seconds from now at which each part ends that still costs `parts` seconds of a core.

    The demo's own parts come first, one after another: pictures on all cores, the plain autoencoder on two. Then every
    variant goes through its parts, `num_workers` at a time, sharing the cores equally.
    """
    now, ends = 0.0, {}
    for (owner, name), cost in parts.items():
        if owner == "demo":
            now += cost / (cores if name == "pictures" else min(float(cores), TWO_THREADS))
            ends[owner, name] = now
    chains = [[part for part in parts if part[0] == owner] for owner in dict.fromkeys(key for key, _ in parts)]
    chains = [chain for chain in chains if chain[0][0] != "demo"]
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
    """A range of seconds as "6 to 9 minutes"."""
    low, high = (max(1, round(seconds / 60)) for seconds in range_s)
    return f"{low} to {high} minutes" if low != high else "about a minute" if high == 1 else f"about {high} minutes"
