import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pictures import encoded, picture

from sendvae_fast.data.indexing.sandbox import CPU_LIMIT_S, examine_parts
from sendvae_fast.data.sources.base import Source
from sendvae_fast.errors import UserError

pytestmark = pytest.mark.slow


class TrapNames(list):
    """Names that do harm when they are looked at, which a worker does while its limits hold."""

    def __getitem__(self, index):
        name = super().__getitem__(index)
        left = signal.getitimer(signal.ITIMER_PROF)[0]
        if name == "slow" and left > CPU_LIMIT_S - 1:
            signal.setitimer(signal.ITIMER_PROF, 0.1)  # as if all but this had passed
            while True:
                pass
        elif name == "waits":
            time.sleep(1)
            assert left - signal.getitimer(signal.ITIMER_PROF)[0] < 0.5
        elif name in ("SIGSEGV", "SIGABRT", "SIGKILL"):
            os.kill(os.getpid(), getattr(signal, name))
        return name


class TrapSource(Source):
    kind = "trap"

    def __init__(self, names):
        super().__init__(None, TrapNames(names))

    def read(self, index):
        return encoded(picture())

    def locate(self, index):
        return ""

    def take(self, indices):
        return TrapSource([list.__getitem__(self.names, i) for i in indices])

    def reading_order(self):
        return np.arange(len(self))

    def _arguments(self):
        return (list(self.names),)


def examined(names, part_size=100, num_workers=2):
    source = TrapSource(names)
    parts = [(start, np.arange(start, min(start + part_size, len(names)))) for start in range(0, len(names), part_size)]
    seen = []
    found = dict(examine_parts(source, parts, num_workers=num_workers, on_sample=seen.append))
    assert found.keys() == {number for number, _ in parts} and len(seen) == len(names)
    return [facts.verdict for number in sorted(found) for facts in found[number]]


def test_a_picture_that_kills_its_process_costs_only_itself():
    names = ["a", "SIGSEGV", "b", "c", "SIGABRT", "SIGSEGV", "d", "SIGSEGV"]
    for part_size in (100, 1, 3):
        expected = ["ok" if len(name) == 1 else f"bad: crashes the decoder ({name})" for name in names]
        assert examined(names, part_size) == expected


def test_a_picture_that_is_never_done_is_bad():
    assert examined(["a", "slow", "b"]) == ["ok", "bad: the decoder comes to no end", "ok"]


def test_waiting_is_not_held_against_a_picture():
    assert examined(["a", "waits"]) == ["ok", "ok"]


def test_a_worker_killed_from_outside_is_no_picture_s_fault():
    with pytest.raises(UserError, match="exit code -9, which is no picture's fault"):
        examined(["a", "SIGKILL", "b"])


MEMORY_SCRIPT = """
from sendvae_fast.data.indexing.sandbox import MEMORY_LIMIT, limits

with limits():
    bytearray(MEMORY_LIMIT // 2)
    try:
        bytearray(MEMORY_LIMIT + 2**20)
    except MemoryError:
        print("refused")
bytearray(MEMORY_LIMIT + 2**20)
print("given back")
"""


def test_memory_is_limited_and_given_back():
    """In a process of its own, as the workers are: other threads of the tests' process take and give memory."""
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\ngiven back\n"), done.stderr


def test_more_workers_than_parts_and_none_at_all():
    assert examined(["a"], num_workers=5) == ["ok"]
    assert list(examine_parts(TrapSource([]), [], num_workers=2)) == []
