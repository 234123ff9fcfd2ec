"""The process that forks programs for tests serves all workers of pytest-xdist and ends with the last of them."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from time_limits import HANG_S

# For every line it is given, a program that says which process has forked it: the parent of the one that waits for it.
WORKER = """
import sys, forks
SAY = "import os; print(open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1])"
for _ in sys.stdin:
    print(forks.run(["-c", SAY], imports=("json",)).stdout.strip(), flush=True)
"""


@pytest.fixture
def start_worker():
    workers = []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_XDIST_TESTRUNUID": uuid.uuid4().hex}

    def start():
        command = [sys.executable, "-c", WORKER]
        worker = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        with worker:
            worker.kill()


def ask(worker):
    worker.stdin.write("\n")
    return int(worker.stdout.readline())


@pytest.mark.slow
def test_one_process_forks_for_all_workers_and_ends_with_the_last(start_worker):
    one, other = start_worker(), start_worker()
    server = ask(one)
    assert ask(other) == server
    one.kill()  # without a word, as a worker that crashes
    one.wait()
    late = start_worker()
    assert ask(other) == ask(late) == server
    for worker in (other, late):
        worker.stdin.close()
        worker.wait(HANG_S)
    deadline_s = time.monotonic() + HANG_S
    while Path(f"/proc/{server}").exists():
        assert time.monotonic() < deadline_s, "it is still there"
        time.sleep(0.02)
    again = start_worker()
    assert ask(again) != server
