"""Independent parts of the demo side by side: small networks keep one core busy each, not two.

The parts run in processes of their own and print nothing; this process shows one progress bar for all of them, which it
reads off what they write.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from sendvae_fast.progress import Progress
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.settings import VAETrainConfig

POLL_INTERVAL_S = 0.5
MAX_WORKERS = 3

Job = TypeVar("Job")


class Count(NamedTuple):
    """How far a group of parts is: `done()` of `total` units."""

    total: int
    done: Callable[[], int]


class Workers:
    """A pool of processes that share the cores between them."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, work: Callable[[Job], int], jobs: Sequence[Job], count: Count, title: str, unit: str) -> list[int]:
        """`work` of every job; returns the exit codes. The first failure is raised, as it was raised there."""
        waiting: set[Future[int]] = {self._pool.submit(work, job) for job in jobs}
        futures = list(waiting)
        with Progress(title, count.total, unit, start=count.done()) as progress:
            while waiting:
                finished, waiting = wait(waiting, POLL_INTERVAL_S, return_when=FIRST_EXCEPTION)
                progress.advance(count.done() - progress.done)
                for future in finished:
                    future.result()
        return [future.result() for future in futures]


@contextmanager
def side_by_side() -> Iterator[Workers]:
    """Workers for the length of the block: one on a machine with a GPU, which they would only fight over, else up to
    one per core.
    """
    cores = len(os.sched_getaffinity(0))
    num_workers = 1 if torch.cuda.is_available() else min(cores, MAX_WORKERS)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (max(cores // num_workers, 1),))
    try:
        yield Workers(pool)
    finally:
        pool.shutdown(cancel_futures=True)


def count_steps(configs: Sequence[VAETrainConfig | SiTTrainConfig]) -> Count:
    """Optimizer steps logged by training runs."""
    total = sum(config.loop.num_steps for config in configs)
    return Count(total, lambda: sum(_last_step(Path(config.run)) for config in configs))


def count_generators(jobs: Sequence[Any]) -> Count:
    """Optimizer steps and pictures of `demo.GeneratorJob`s."""
    steps = count_steps([job.sit for job in jobs])
    pictures = sum(job.sample.num_samples for job in jobs)
    folders = [Path(job.sample.out) for job in jobs]
    return Count(
        steps.total + pictures, lambda: steps.done() + sum(len(list(folder.glob("*.png"))) for folder in folders)
    )


def _start_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    Progress.silence()


def _last_step(run: Path) -> int:
    """The last step in a run's metrics; 0 while there is none."""
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):
        return 0
