"""Processes that end when the one that started them does, whatever ended it: kill -9 included."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def process_pool(
    num_workers: int,
    prepare: Callable[..., object] | None = None,
    arguments: tuple = (),
    grace_s: float = 0.0,
    preload: str | None = None,
) -> ProcessPoolExecutor:
    """A pool of processes that are not forked from the caller: it may have live torch threads, which do not survive.

    Args:
        num_workers: the processes.
        prepare: called once in each process, with `arguments`.
        arguments: of `prepare`.
        grace_s: seconds between SIGTERM and the end for what a process is at when its parent is gone; 0: no time.
        preload: a module that a server imports once, from which the processes are forked; without it each is spawned.
    """
    context = multiprocessing.get_context("spawn" if preload is None else "forkserver")
    if preload is not None:
        context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(num_workers, context, _prepare, (grace_s, prepare, arguments))


def parent_is_gone() -> bool:
    """Whether the process that started this one has ended; False in one that nobody started."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def end_with_parent(grace_s: float = 0.0) -> None:
    """From now on, end this process when the one that started it has ended; `grace_s` as for `process_pool`."""
    threading.Thread(target=_end_with_parent, args=(grace_s,), name="parent", daemon=True).start()


def _prepare(grace_s: float, prepare: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    end_with_parent(grace_s)
    if prepare is not None:
        prepare(*arguments)


def _end_with_parent(grace_s: float) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in such processes only
    parent.join()
    if grace_s:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
    os._exit(1)
