"""The trials' work, claimed one by one by whoever is free: processes of this machine, of others, ranks of one job.

A trial is claimed by the lock of its folder, which its owner loses when it dies, however it dies. Small networks keep
one core busy each, not several: on a CPU a comparison works in several processes. They print nothing but what went
wrong; a training is asked to save itself when the process that started it is gone or is asked to stop.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

import torch

from sendvae_fast.compare.plan import Comparison, Trial
from sendvae_fast.compare.trial import is_trained, run_trial, train_autoencoder
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run_lock import claimed
from sendvae_fast.engine.signals import EXIT_REQUEUE, StopOnSignal
from sendvae_fast.errors import UserError
from sendvae_fast.processes import parent_is_gone, process_pool
from sendvae_fast.progress import Progress

WORK = "sendvae_fast.compare.trial"
"""What the workers run, and would import for seconds each."""
POLL_INTERVAL_S = 1.0
MAX_WORKERS = 3
GRACE_S = 30.0
"""Time for a training to save itself once the parent is gone."""
ALL_DONE, NOTHING_FREE = -1, -2

Job = TypeVar("Job")


def train_starts(comparison: Comparison, ranks: Distributed) -> int:
    """Train the autoencoders that others start from, with all that this process has, where they are fewer than workers.

    Returns:
        The exit code of a training that was stopped by a signal, else 0.
    """
    starts = {id(trial.start): trial.start for trial in comparison.trials if trial.start is not None}
    missing = [trial for trial in starts.values() if not is_trained(trial)]
    if len(missing) >= num_workers():
        return 0
    for trial in missing:
        trial.folder.mkdir(parents=True, exist_ok=True)
        with claimed(trial.folder) as is_ours:
            if is_ours and (code := train_autoencoder(trial, ranks)):
                return code
    return 0


def work_off(comparison: Comparison, after_part: Callable[[], object] = lambda: None) -> int:
    """Do one trial after another that nobody else does, until all are done. Collective: all ranks do the same trial.

    A trial that fails leaves the others their turn; those that start from it are left out.

    Returns:
        The exit code of a training that was stopped by a signal, else 0.

    Raises:
        UserError: the first that a trial raised, when the others are done.
    """
    ranks, failed = init_distributed(), dict[int, UserError]()
    trials = comparison.trials
    while not parent_is_gone():
        with ExitStack() as claim:
            chosen = _claim_next(trials, failed, claim) if ranks.is_main else None
            number = ranks.broadcast_object(chosen)
            if number == ALL_DONE:
                break
            if number == NOTHING_FREE:
                time.sleep(POLL_INTERVAL_S)
                continue
            try:
                if code := run_trial(trials[number], ranks, after_part):
                    return code
            except UserError as error:
                failed[number] = error
                if ranks.is_main:
                    print(f"{trials[number].name}: {error} (the others go on)", file=sys.stderr, flush=True)
    else:
        return EXIT_REQUEUE
    for error in failed.values():
        raise error
    return 0


def _claim_next(trials: Sequence[Trial], failed: dict[int, UserError], claim: ExitStack) -> int:
    """The number of the first trial that can be done now, its lock held by `claim`; else why there is none."""
    is_left, lost = False, {id(trials[number]) for number in failed}
    for number, trial in enumerate(trials):
        if id(trial.start) in lost:
            lost.add(id(trial))
        if id(trial) in lost or trial.is_done:
            continue
        is_left = True
        if trial.start is not None and not is_trained(trial.start):
            continue
        trial.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as own:
            if own.enter_context(claimed(trial.folder)) and not trial.is_done:
                claim.push(own.pop_all())
                return number
    return NOTHING_FREE if is_left else ALL_DONE


class Workers:
    """A pool of processes that share the cores between them."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, work: Callable[[Job], int], jobs: Sequence[Job], watch: Callable[[], object]) -> list[int]:
        """`work` of every job, with `watch` called meanwhile every `POLL_INTERVAL_S`; returns the exit codes.

        A signal that asks this process to stop is passed on to the workers. The first failure is raised, as it was
        raised there; UserError where a worker is killed.
        """
        with StopOnSignal(Distributed()) as stop:
            try:
                waiting: set[Future[int]] = {self._pool.submit(_work, work, job) for job in jobs}
                futures = list(waiting)
                while waiting:
                    finished, waiting = wait(waiting, POLL_INTERVAL_S, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                    watch()
                    if stop.requested():
                        stop_children(signal.SIGTERM)
                        if wait(waiting, GRACE_S).not_done:
                            stop_children(signal.SIGKILL)
                        return [EXIT_REQUEUE]
                return [future.result() for future in futures]
            except BrokenProcessPool:
                if stop.requested():
                    return [EXIT_REQUEUE]
                raise UserError(
                    "a worker was killed, perhaps because memory was short: run the same command again to go on"
                ) from None


def stop_children(number: int) -> None:
    """Signal this process's workers: at SIGTERM a training saves itself; nothing that is killed loses what it wrote."""
    for child in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            if child.pid is not None:
                os.kill(child.pid, number)


def num_workers() -> int:
    """One on a machine with a GPU, which they would only fight over, or with one core; else a few."""
    return 1 if torch.cuda.is_available() or len(os.sched_getaffinity(0)) == 1 else MAX_WORKERS


@contextmanager
def side_by_side() -> Iterator[Workers]:
    """Workers for the length of the block."""
    num, cores = num_workers(), len(os.sched_getaffinity(0))
    pool = process_pool(num, _start_worker, (max(cores // num, 1),), GRACE_S, preload=WORK)
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
