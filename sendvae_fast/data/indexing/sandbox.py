"""The examination of pictures in worker processes, so that a hostile picture harms nothing but its own verdict.

What a picture may cost is counted in `data.limits`, so that its verdict is the same here, in training and on any
machine. This is the net for what no limit foresees, a crash or an endless loop in a decoder: a worker examines one
picture after the other; for each the kernel kills it after `CPU_LIMIT_S` of CPU time, ten times what any picture within
the limits takes, and refuses it more than `MEMORY_LIMIT` further bytes. When a worker dies, the picture that it was
examining is bad for that reason, and a new worker continues with the next one.
"""

import hashlib
import itertools
import multiprocessing
import resource
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sendvae_fast.data.decode import UnreadableImage, examine
from sendvae_fast.data.patience import read_patiently
from sendvae_fast.data.sources.base import Source
from sendvae_fast.errors import UserError
from sendvae_fast.processes import end_with_parent

CPU_LIMIT_S = 30.0
MEMORY_LIMIT = 2**31
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


class SampleFacts(NamedTuple):
    """A row of `catalog_file.FACTS`."""

    size: int | None
    sha256: bytes | None
    width: int
    height: int
    mode: str
    format: str
    verdict: str


def bad_sample(reason: str) -> SampleFacts:
    """The facts about a sample whose bytes or pixels could not be read."""
    return SampleFacts(None, None, 0, 0, "", "", f"bad: {reason}")


def examine_sample(source: Source, index: int, quick: bool = False) -> SampleFacts:
    """Read and examine a sample under this module's limits. Nothing in the sample but these limits ends this process.

    Args:
        quick: do not decode; see `decode.examine`.
    """
    try:
        data = read_patiently(partial(source.read, index))
    except UnreadableImage as error:
        return bad_sample(error.reason)
    with limits():
        facts = examine(data, source.names[index], quick)
    return SampleFacts(
        len(data), hashlib.sha256(data).digest(), facts.width, facts.height, facts.mode, facts.format, facts.verdict
    )


def examine_parts(
    source: Source,
    parts: Iterable[tuple[int, np.ndarray]],
    *,
    num_workers: int,
    quick: bool = False,
    on_sample: Callable[[SampleFacts], None] = lambda facts: None,
) -> Iterator[tuple[int, list[SampleFacts]]]:
    """Examine parts of a source in worker processes.

    Args:
        parts: (number, indices int64 [n], n > 0) of each.
        quick: do not decode; see `decode.examine`.
        on_sample: called after every sample.

    Yields:
        (number, facts of its samples in order), part by part as they get done.

    Raises:
        UserError: when a worker dies for any other reason than a picture.
    """
    pending = (_Job(number, source.take(indices)) for number, indices in parts)
    workers = [_Worker(job, quick) for job in itertools.islice(pending, num_workers)]
    try:
        while workers:
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                for facts in worker.receive():
                    on_sample(facts)
                if not worker.job.is_done:
                    continue
                yield worker.job.number, worker.job.facts
                job = next(pending, None)
                if job is None:
                    workers.remove(worker)
                    worker.end()
                else:
                    worker.give(job)
    finally:
        for worker in workers:
            worker.end()


@dataclass
class _Job:
    """A part for one worker, and the facts about its first samples so far."""

    number: int
    source: Source
    facts: list[SampleFacts] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.facts) == len(self.source)

    def rest(self) -> Source:
        """The samples still to be examined."""
        return self.source.take(np.arange(len(self.facts), len(self.source)))


class _Worker:
    """A process that examines one part after the other, and is replaced when a picture kills it."""

    def __init__(self, job: _Job, quick: bool) -> None:
        self.job, self._quick = job, quick
        self._start()

    def give(self, job: _Job) -> None:
        """Send `job` to the worker."""
        self.job = job
        with suppress(ConnectionError):  # `receive` deals with a dead worker
            self.connection.send(job.rest())

    def receive(self) -> list[SampleFacts]:
        """Receive the worker's facts since the last call; to be called when its connection is ready."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            return self._replace()
        if message is None:
            self._is_ready = True
            return []
        self.job.facts.append(message)
        return [message]

    def end(self) -> None:
        """Stop the process."""
        self._process.terminate()
        self._process.join()
        self.connection.close()

    def _start(self) -> None:
        # Not forked: the caller may have live threads, and a fork server starts replacements quickly.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._quick), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False
        if not self.job.is_done:
            self.give(self.job)

    def _replace(self) -> list[SampleFacts]:
        """After the death of the process: the facts about the picture it was at."""
        self._process.join()
        number = -(self._process.exitcode or 0)
        self.connection.close()
        if number == signal.SIGPROF:
            facts = bad_sample("the decoder comes to no end")
        elif number in CRASHES and self._is_ready:
            facts = bad_sample(f"crashes the decoder ({signal.Signals(number).name})")
        else:
            raise UserError(
                f"a worker process ended with exit code {-number}, which is no picture's fault; if memory is short, "
                "give fewer workers; run the same command again to go on"
            )
        self.job.facts.append(facts)
        self._start()
        return [facts]


def _serve(connection: Connection, quick: bool) -> None:
    """Body of a worker: sources come in, facts go out, sample by sample."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C goes to all; the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # Pillow's warnings about odd files; the verdict is enough
    try:
        connection.send(None)
        while True:
            source = connection.recv()
            for index in range(len(source)):
                connection.send(examine_sample(source, index, quick))
    except (EOFError, ConnectionError):
        return  # the parent is gone


@contextmanager
def limits() -> Iterator[None]:
    """Let the kernel kill this process, or refuse it memory, when the block needs too much."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_LIMIT, before[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
