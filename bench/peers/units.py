"""The work of one process: the first step of a column, or its times."""

import contextlib
import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.peers import autoencoder_kl, lightningdit, repa_e
from bench.peers.case import Column, PeerCase
from bench.peers.first_step import FirstStep
from bench.peers.theirs import allow_tf32
from bench.timing import time_calls
from sendvae_fast.files import save_tensors
from sendvae_fast.models.weights import read_weights

PEERS: dict[str, Any] = {peer.NAME: peer for peer in (repa_e, lightningdit, autoencoder_kl)}
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Unit:
    """A column of a case, to be run in a process of its own."""

    peer: str
    folder: Path
    case: PeerCase
    column: Column
    device: str
    threads: int

    def build(self, scratch: Path) -> Any:
        """The step, `bench.peers.ours.OurStep` or the peer's."""
        torch.set_num_threads(self.threads)
        if self.column.compile == "none" and self.column.precision == "fp32":
            allow_tf32(False)
        peer = PEERS[self.peer]
        build = peer.ours if self.column.ours else peer.theirs
        return build(self.case, self.column, torch.device(self.device), peer.open_checkout(self.folder), scratch)

    def stance(self) -> contextlib.AbstractContextManager[Any]:
        """A context without torch.compile for the peer's own decorators, where the column has none."""
        if self.column.compile == "none" and not self.column.ours:
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()


def first_step(unit: Unit, file: Path) -> dict[str, float]:
    """Make a column's first step; its losses, and its gradients in `file`."""
    with tempfile.TemporaryDirectory() as scratch, unit.stance(), quiet():
        step: FirstStep = unit.build(Path(scratch)).first()
    save_tensors(file, {name: gradient.contiguous() for name, gradient in step.gradients.items()})
    return step.losses


def read_first_step(losses: dict[str, float], file: Path) -> FirstStep:
    """What `first_step` made."""
    return FirstStep(losses, read_weights(file))


def step_times(unit: Unit, iterations: int) -> dict[str, Any]:
    """The median of a column's step in microseconds, its quartiles, and the most memory on a GPU, after a warm-up."""
    device = torch.device(unit.device)
    with tempfile.TemporaryDirectory() as scratch, unit.stance(), quiet():
        step = unit.build(Path(scratch))
        step.first()  # with what is compiled then
        for _ in range(WARMUP_STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times_us = _times_us(device, step, iterations)
    q1, median, q3 = statistics.quantiles(times_us, n=4, method="inclusive") if iterations > 1 else times_us * 3
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"median_us": median, "q1_us": q1, "q3_us": q3, "peak_bytes": peak}


@contextlib.contextmanager
def quiet() -> Any:
    """Without the warnings of foreign code about versions of PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _times_us(device: torch.device, step: Callable[[], None], iterations: int) -> list[float]:
    """Times of consecutive steps. On a GPU the host may run ahead, as in training."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize(device)
        return [1e3 * before.elapsed_time(after) for before, after in itertools.pairwise(events)]
    return [1e6 * time_calls(device, lambda _: step(), range(1), 1) for _ in range(iterations)]
