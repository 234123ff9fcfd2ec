"""Two jobs never write into one run."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from sendvae_fast.engine import run_lock
from sendvae_fast.engine.run_lock import LOCK_FILE, STALE_S, lock_run
from sendvae_fast.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from sendvae_fast.engine.run_lock import lock_run
lock_run(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def fail(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", fail)
    monkeypatch.setattr(run_lock, "_held", {})


def left_by(folder, host, process, age_s):
    (folder / LOCK_FILE).write_text(json.dumps({"host": host, "process": process, "since": "yesterday"}))
    os.utime(folder / LOCK_FILE, (time.time() - age_s,) * 2)


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_goes(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on {socket.gethostname()}"):
            lock_run(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        lock_run(tmp_path)
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()
    finally:
        holder.kill()
        holder.stdout.close()


def test_a_process_may_take_its_own_lock_again(tmp_path):
    lock_run(tmp_path)
    lock_run(tmp_path / ".." / tmp_path.name)


@pytest.mark.parametrize(
    ("host", "process", "age_s", "free"),
    [
        (socket.gethostname(), os.getppid(), 10 * STALE_S, False),
        (socket.gethostname(), 2**22 + 1, 0, True),
        ("node-7", 1, STALE_S - 5, False),
        ("node-7", 1, STALE_S + 5, True),
    ],
    ids=["a living process", "a dead process", "a living host", "a dead host"],
)
def test_without_locks_of_the_file_system(no_locks, tmp_path, host, process, age_s, free):
    left_by(tmp_path, host, process, age_s)
    if free:
        lock_run(tmp_path)
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()
    else:
        with pytest.raises(UserError, match=rf"in use by process {process} on {host}, since yesterday"):
            lock_run(tmp_path)


def test_a_damaged_lock_file_locks_nobody_out(no_locks, tmp_path):
    (tmp_path / LOCK_FILE).write_bytes(b"\xff[")
    lock_run(tmp_path)


def test_the_sign_of_life(no_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.01)
    lock_run(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    deadline = time.monotonic() + 30
    while (tmp_path / LOCK_FILE).stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - (tmp_path / LOCK_FILE).stat().st_mtime < STALE_S
