"""The demo's variants side by side, in processes of their own: small networks keep one core busy each, not several.

The processes print nothing; a training is asked to save itself when the process that started it is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from sendvae_fast.processes import parent_is_gone, process_pool
from sendvae_fast.progress import Progress

VARIANT = "sendvae_fast.demo.variant"
"""What the workers run, and would import for seconds each; by name: it need not be imported here."""
POLL_INTERVAL_S = 1.0
MAX_WORKERS = 3
GRACE_S = 30.0
"""Time for a training to save itself once the parent is gone."""

Job = TypeVar("Job")


class Workers:
    """A pool of processes that share the cores between them."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, work: Callable[[Job], int], jobs: Sequence[Job], watch: Callable[[], object]) -> list[int]:
        """`work` of every job, with `watch` called meanwhile every `POLL_INTERVAL_S`; returns the exit codes.

        The first failure is raised, as it was raised there.
        """
        waiting: set[Future[int]] = {self._pool.submit(_work, work, job) for job in jobs}
        futures = list(waiting)
        while waiting:
            finished, waiting = wait(waiting, POLL_INTERVAL_S, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            watch()
        return [future.result() for future in futures]


def num_workers() -> int:
    """One on a machine with a GPU, which they would only fight over, or with one core; else one for each variant."""
    return 1 if torch.cuda.is_available() or len(os.sched_getaffinity(0)) == 1 else MAX_WORKERS


@contextmanager
def side_by_side() -> Iterator[Workers]:
    """Workers for the length of the block."""
    num, cores = num_workers(), len(os.sched_getaffinity(0))
    pool = process_pool(num, _start_worker, (max(cores // num, 1),), GRACE_S, preload=VARIANT)
    try:
        yield Workers(pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    Progress.silence()


def _work(work: Callable[[Job], int], job: Job) -> int:
    code = work(job)
    if parent_is_gone():
        os._exit(code)  # nobody waits for the answer, and the pool would wait for the next job for ever
    return code
