"""Every process that we start ends with the one that started it, however that ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_state import is_running

import sendvae_fast

pytestmark = pytest.mark.slow

PACKAGE = Path(sendvae_fast.__file__).parent
SCRIPT = """
import os, sys, time
from pathlib import Path
import numpy as np
from sendvae_fast.data.indexing.sandbox import examine_parts
from sendvae_fast.data.sources.folder import FolderSource
from sendvae_fast.processes import process_pool

class Waits(FolderSource):
    def read(self, index):  # what a worker is at when its parent dies: a disk that does not answer
        wait()
    def take(self, indices):
        return Waits(self.root, self.names)

def wait(number=0):
    Path(sys.argv[1] if len(sys.argv) > 1 else os.environ["PIDS"], str(os.getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    os.environ["PIDS"] = sys.argv[1]
    if sys.argv[2] == "pool":
        with process_pool(2) as pool:
            list(pool.map(wait, range(2)))
    else:
        source = Waits(Path("x"), ["a", "b"])
        list(examine_parts(source, [(0, np.arange(2)), (1, np.arange(2))], num_workers=2))
"""


def wait_for(condition, seconds, complaint):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["pool", "sandbox"])
def test_workers_end_with_their_parent(kind, number, tmp_path):
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    pids.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script, pids, kind], env=environment, stderr=subprocess.DEVNULL) as parent:
        wait_for(lambda: len(list(pids.iterdir())) == 2 or parent.poll() is not None, 120, "no worker started")
        parent.send_signal(number)
        parent.wait(60)
    workers = [int(path.name) for path in pids.iterdir()]
    assert len(workers) == 2
    wait_for(lambda: not any(map(is_running, workers)), 20, f"{workers} are still there")


def test_processes_are_started_nowhere_else():
    """Where they are, each is known to end: the pool and the sandbox above; git and nvidia-smi in a time limit."""
    allowed = {
        "processes.py": {"multiprocessing", "ProcessPoolExecutor"},
        "data/indexing/sandbox.py": {"multiprocessing"},
        "compare/workers.py": {"multiprocessing", "ProcessPoolExecutor"},
        "cli/doctor_gpu.py": {"subprocess"},
        "version.py": {"subprocess"},
    }
    words = re.compile(r"\b(multiprocessing|subprocess|ProcessPoolExecutor|Popen|os\.fork|os\.system|os\.spawn\w*)\b")
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if names := set(words.findall(path.read_text())):
            found[path.relative_to(PACKAGE).as_posix()] = names
    assert found == allowed
