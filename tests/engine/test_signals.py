import os
import signal

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


def test_handlers_come_back():
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
