"""A run that no longer moves ends, and the message names the rank that does not answer."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager

import forks
import pytest
from process_state import state_of

from sendvae_fast.engine import flight_record, watchdog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.watchdog import EXIT_STUCK, Watchdog

START_S = 600.0
WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from sendvae_fast.cli.main import main
from sendvae_fast.cli import main as command
from sendvae_fast.engine import flight_record, watchdog
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.watchdog import Watchdog

watchdog.BEAT_S, watchdog.SILENT_S = 0.1, 1.0
flight_record.NUM_KEPT = 5

def train(arguments):
    ranks = init_distributed("cpu", records=sys.argv[2])
    with Watchdog(ranks, 1.0, 600.0, Path(sys.argv[2])) as dog:
        for step in range(1, 6):
            if step == 4 and str(ranks.rank) in sys.argv[3]:
                os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            ranks.all_reduce_sum(torch.ones(1))
            dog.finished(step)
    return 0

command._dispatch = train
sys.exit(main())
"""


@contextmanager
def two_ranks(way, which, folder):
    """`WORKER` on two ranks, of which those of `which` meet the signal `way`; they are killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    with open(folder / "errors.txt", "w") as file:
        ranks = [
            forks.start(
                ["-c", WORKER, way, folder, which], env={**os.environ, **meeting, "RANK": str(rank)}, stderr=file
            )
            for rank in (0, 1)
        ]
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("way", "why"), [("SIGSTOP", "no step was finished for"), ("SIGKILL", "a collective failed")])
def test_the_rank_that_does_not_answer_is_named(way, why, tmp_path):
    with two_ranks(way, "1", tmp_path) as ranks:
        code = ranks[0].wait()
    errors = (tmp_path / "errors.txt").read_text()
    assert code == EXIT_STUCK, errors
    assert why in errors and "after step 3: rank 1 does not answer" in errors
    if way == "SIGSTOP":
        assert "all_reduce_sum" in (tmp_path / "stacks_rank0.txt").read_text()
        assert f"the last collectives in {tmp_path}/collectives_*_rank*.json" in errors
        record = json.loads((tmp_path / "collectives_gloo_rank0.json").read_text())
        *before, last = record["entries"]
        assert len(before) == 4, "as many as were asked for by the environment"
        assert "all_reduce" in last["profiling_name"] and not last["retired"]
        assert all(entry["retired"] for entry in before)


@pytest.mark.parametrize("has_new_names", [True, False])
def test_what_the_user_has_set_for_the_record_stays(has_new_names, tmp_path, monkeypatch):
    monkeypatch.setattr(flight_record, "_HAS_NEW_NAMES", has_new_names)
    names = [name for pair in flight_record._NAMES.values() for name in pair]
    for name in names:
        monkeypatch.setenv(name, "of before")  # so that all is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "0")
    flight_record.record_into(tmp_path)
    found = {name: os.environ[name] for name in names if name in os.environ}
    write, file = ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    if has_new_names:
        write, file = ("TORCH_FR_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
    assert found == {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", write: "1", file: f"{tmp_path}/nccl_rank"}


def test_a_record_that_does_not_come_is_not_waited_for(tmp_path):
    """As where a GPU hangs and its queries hold the interpreter: the process ends with its stacks in any case."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(tmp_path / "said.txt", os.O_CREAT | os.O_WRONLY), 2)
        flight_record.PATIENCE_S = 0.2
        flight_record._record_of = lambda backend: time.sleep(START_S)
        flight_record.write_records(tmp_path, 0)
        os._exit(0)
    until = time.monotonic() + 60
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended[0] == pid and os.waitstatus_to_exitcode(ended[1]) == 1
    assert "_records" in (tmp_path / "said.txt").read_text()


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
    with Watchdog(Distributed(), 0.1, START_S, tmp_path) as dog:
        dog.finished(7)
        assert given_up.wait(30), "nobody noticed"
    assert codes == [EXIT_STUCK]
    assert "after step 7: the run was training" in capsys.readouterr().err
    assert "test_one_rank_that_hangs" in (tmp_path / "stacks_rank0.txt").read_text()


def test_what_may_take_long_does(exits, tmp_path):
    """A checkpoint, the first step, and a step that is slow beside others as slow."""
    codes, given_up = exits
    with Watchdog(Distributed(), 0.1, START_S, tmp_path) as dog:
        assert not given_up.wait(0.3)
        dog.finished(1)
        with dog.pausing("saving"):
            assert not given_up.wait(0.3)
        time.sleep(0.05)
        dog.finished(2)
        assert not given_up.wait(0.3)
    assert codes == []


STEPS = """
import sys, time
from pathlib import Path
from sendvae_fast.engine import watchdog
from sendvae_fast.engine.distributed import Distributed

watchdog.BEAT_S, watchdog.SILENT_S = 0.05, 0.5
with watchdog.Watchdog(Distributed(), 1.0, 600.0, Path(sys.argv[1])) as dog:
    for step in range(1, 60):
        dog.finished(step)
        if step == 3:
            Path(sys.argv[1], "began").touch()
        time.sleep(0.05)
    Path(sys.argv[1], "longest").write_text(str(dog._longest_s))
"""


@pytest.mark.slow
def test_a_process_that_was_stopped_goes_on(tmp_path):
    """As Slurm stops a job that others go before, and a host a virtual machine."""
    with forks.start(["-c", STEPS, tmp_path]) as process:
        while not (tmp_path / "began").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        process.send_signal(signal.SIGCONT)
    assert process.returncode == 0, "it was taken for one that hangs"
    assert float((tmp_path / "longest").read_text()) < 3.0, "the limit of slow steps has grown by it"


@pytest.mark.slow
def test_ranks_that_were_stopped_together_go_on(tmp_path):
    """As Slurm suspends a job: the second of them goes on a little later than the first."""
    with two_ranks("SIGSTOP", "01", tmp_path) as ranks:
        while any(rank.poll() is None and state_of(rank.pid) != "T" for rank in ranks):
            time.sleep(0.01)
        time.sleep(3.0)
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
            time.sleep(0.3)
        codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], (tmp_path / "errors.txt").read_text()


def test_what_is_no_step_has_a_limit_of_its_own(exits, tmp_path, capsys):
    codes, given_up = exits
    with Watchdog(Distributed(), START_S, 0.1, tmp_path) as dog:
        dog.finished(1)
        assert not given_up.wait(0.3)
        with dog.pausing("saving"):
            assert given_up.wait(30), "nobody noticed"
    assert codes == [EXIT_STUCK] and "the run was saving" in capsys.readouterr().err


def test_an_error_of_one_rank_is_its_own(tmp_path):
    with pytest.raises(RuntimeError, match="of mine"), Watchdog(Distributed(), 10, START_S, tmp_path):
        raise RuntimeError("of mine")
