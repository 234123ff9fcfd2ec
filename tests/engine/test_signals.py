import os
import signal
import subprocess
import sys

import pytest

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.signals import EXIT_REQUEUE, SIGNALS, StopOnSignal


@pytest.fixture(autouse=True)
def of_a_terminal():
    """Signals as a program in a terminal has them, also where the tests were started by nohup or in the background."""
    usual = {**dict.fromkeys(SIGNALS, signal.SIG_DFL), signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_until_asked(number, capsys):
    with StopOnSignal(Distributed()) as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.requested()
    assert f"{signal.Signals(number).name}: stopping after this step" in capsys.readouterr().err


def test_second_interrupt_is_immediate():
    with pytest.raises(KeyboardInterrupt), StopOnSignal(Distributed()):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_come_back(monkeypatch):
    monkeypatch.setattr(StopOnSignal, "_process_ends", False)  # an earlier test may have run a whole `train` here
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopOnSignal(Distributed()):
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_comes_late_changes_nothing():
    """Batch systems signal each host: another rank may have been stopped by its signal before this one got its own."""
    with StopOnSignal(Distributed()) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal(Distributed()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_code_asks_for_another_start():
    assert EXIT_REQUEUE == os.EX_TEMPFAIL


LATE = """
import atexit, os, signal, sys, threading
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.signals import EXIT_REQUEUE, SIGNALS, StopOnSignal

def signal_all(kill=os.kill, pid=os.getpid, numbers=[n for n in SIGNALS if n != signal.SIGINT]):
    for number in numbers:
        kill(pid(), number)

class Last:  # is freed when the interpreter has taken its handlers away
    def __del__(self, signal_all=signal_all):
        signal_all()

def run(case):
    atexit.register(signal_all)
    last.append(Last())
    if case != "one of several":
        StopOnSignal.ends_with_its_run()
    with StopOnSignal(Distributed()) as stop:
        if case == "stopped":
            os.kill(os.getpid(), signal.SIGUSR1)
        stop.requested()
        if case == "failed":
            raise SystemExit(2)
    signal_all()
    raise SystemExit(EXIT_REQUEUE if stop.requested() else 0)

last = []
for case in ("finished", "stopped", "failed", "one of several"):
    if (child := os.fork()) == 0:
        run(case)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_no_signal_changes_how_a_finished_run_ends():
    """After the last step, in the interpreter's end, behind its handlers; an error or more to do leaves them as usual.

    Without that the exit code is 138, and the batch system starts the finished job again or calls it failed.
    """
    done = subprocess.run([sys.executable, "-c", LATE], check=True, capture_output=True, text=True)
    killed = str(-signal.SIGTERM)
    assert done.stdout.split() == ["0", str(EXIT_REQUEUE), killed, killed], done.stderr
