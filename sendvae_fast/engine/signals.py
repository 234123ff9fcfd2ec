"""Stopping on a signal: finish the step, save, exit with a code that asks to be started again."""

import atexit
import signal
import sys
from types import FrameType, TracebackType
from typing import Self

import torch

from sendvae_fast.engine.distributed import Distributed

EXIT_REQUEUE = 75
"""Exit code of a run that stopped on a signal and resumes when the same command is run again (EX_TEMPFAIL)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopOnSignal:
    """Remembers a signal that asks to end, for the training loop.

    SIGTERM, SIGINT, SIGHUP (the terminal was closed), and SIGUSR1 and SIGUSR2, which batch systems send before the time
    limit.

        with StopOnSignal(distributed) as stop:
            for step in ...:
                ...
                if stop.requested():
                    checkpointer.save(step, write)
                    raise SystemExit(EXIT_REQUEUE)

    A second SIGINT interrupts at once. The earlier handlers are restored at the end; where a stop was asked for, the
    signals are ignored from there on: a batch system signals each host by itself, and what comes late, when all ranks
    have saved, must not end this one in another way. So they are after the last step of a process that was started
    for one run alone (`ends_with_its_run`).
    """

    _process_ends = False

    @classmethod
    def ends_with_its_run(cls) -> None:
        """From now on this process counts as one that only ends after a run: no signal is to change its exit code."""
        cls._process_ends = True

    def __init__(self, distributed: Distributed) -> None:
        self._distributed = distributed
        self._received = self._stopping = False

    def __enter__(self) -> Self:
        # Under nohup the end of the terminal is ignored, and must stay so.
        asked = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in asked}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending = self._stopping or (self._process_ends and kind is None)
        for number, handler in self._before.items():
            signal.signal(number, _come_too_late if ending and number != signal.SIGINT else handler)
        if ending:
            atexit.unregister(_ignore_what_comes_late)
            atexit.register(_ignore_what_comes_late)

    def requested(self) -> bool:
        """Whether any rank was asked to stop. Collective: all ranks get the same answer at the same step.

        A tensor on the CPU carries the answer, so that it costs no GPU synchronisation.
        """
        self._stopping = self._distributed.all_reduce_sum(torch.tensor(int(self._received))).item() > 0
        return self._stopping

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._received and self._distributed.is_main:
            print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr, flush=True)
        self._received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _come_too_late(number: int, frame: FrameType | None) -> None:
    """Nothing. In place of SIG_IGN, which processes that are started later would inherit."""


def _ignore_what_comes_late() -> None:
    """At the interpreter's end, which takes handlers away and would leave signals that end the process."""
    for number in SIGNALS:
        if signal.getsignal(number) is _come_too_late:
            signal.signal(number, signal.SIG_IGN)
