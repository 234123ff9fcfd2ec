"""A run that no longer moves ends, and the message names the rank that does not answer."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from sendvae_fast.engine import watchdog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.watchdog import EXIT_STUCK, Watchdog

WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from sendvae_fast.cli.main import main
from sendvae_fast.cli import main as command
from sendvae_fast.engine import watchdog
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.watchdog import Watchdog

watchdog.BEAT_S, watchdog.SILENT_S = 0.1, 1.0

def train(arguments):
    ranks = init_distributed("cpu")
    with Watchdog(ranks, 1.0, Path(sys.argv[2])) as dog:
        for step in range(1, 6):
            if step == 4 and ranks.rank == 1:
                os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            ranks.all_reduce_sum(torch.ones(1))
            dog.finished(step)
    return 0

command._dispatch = train
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "why"), [("SIGSTOP", "no step was finished for"), ("SIGKILL", "a collective failed")])
def test_the_rank_that_does_not_answer_is_named(way, why, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, way, tmp_path],
            env={**os.environ, **meeting, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = ranks[0].communicate(timeout=120)[1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        ranks[1].stderr.close()
    assert ranks[0].returncode == EXIT_STUCK, errors
    assert why in errors and "after step 3: rank 1 does not answer" in errors
    if way == "SIGSTOP":
        assert "all_reduce_sum" in (tmp_path / "stacks_rank0.txt").read_text()


@pytest.fixture
def exits(monkeypatch):
    """Codes that the process would have ended with; the watchdog's thread ends instead."""
    codes, given_up = [], threading.Event()

    def leave(code):
        codes.append(code)
        given_up.set()

    monkeypatch.setattr(watchdog, "BEAT_S", 0.01)
    monkeypatch.setattr(os, "_exit", leave)
    return codes, given_up


def test_one_rank_that_hangs_writes_its_stacks(exits, tmp_path, capsys):
    codes, given_up = exits
    with Watchdog(Distributed(), 0.1, tmp_path) as dog:
        dog.finished(7)
        assert given_up.wait(30), "nobody noticed"
    assert codes == [EXIT_STUCK]
    assert "after step 7: the run was training" in capsys.readouterr().err
    assert "test_one_rank_that_hangs" in (tmp_path / "stacks_rank0.txt").read_text()


def test_what_may_take_long_does(exits, tmp_path):
    """A checkpoint, the first step, and a step that is slow beside others as slow."""
    codes, given_up = exits
    with Watchdog(Distributed(), 0.1, tmp_path) as dog:
        assert not given_up.wait(0.3)
        dog.finished(1)
        with dog.pausing("saving"):
            assert not given_up.wait(0.3)
        time.sleep(0.05)
        dog.finished(2)
        assert not given_up.wait(0.3)
    assert codes == []


def test_an_error_of_one_rank_is_its_own(tmp_path):
    with pytest.raises(RuntimeError, match="of mine"), Watchdog(Distributed(), 10, tmp_path):
        raise RuntimeError("of mine")
