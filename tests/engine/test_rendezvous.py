"""Ranks that cannot meet say why, in one line on each, and do not wait for ever."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from time_limits import HANG_S

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said():
    """What the ranks of each case say; see `rendezvous_worker.py`."""
    worker = Path(__file__).with_name("rendezvous_worker.py")
    command = [sys.executable, worker]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=HANG_S, cwd=worker.parents[2])
    return json.loads(done.stdout)


def test_a_taken_port_is_said_by_rank_0_and_by_who_waits_for_it(said):
    first, second = said["taken"]
    assert f"rank 0 cannot listen at 127.0.0.1:PORT, because another process of {said['host']} does" in first
    assert second.startswith("cannot reach rank 0 at 127.0.0.1:PORT") and "look into the log of rank 0" in second


def test_a_rank_that_does_not_come(said):
    (alone,) = said["missing"]
    assert alone.startswith("waited 1 s at 127.0.0.1:PORT for 2 ranks, and not all came")


def test_the_store_of_another_job_at_the_port(said):
    first, second = said["strangers"]
    assert "for rank 1 of 2" in first and "set another MASTER_PORT" in first
    assert "for rank 0 of 2" in second or "for the other ranks" in second


def test_versions_that_differ_are_said_by_all(said):
    for words in said["versions"]:
        assert "has torch 1.0: use one environment on all nodes" in words
        assert f"rank 0 on {said['host']}" in words and f"rank 1 on {said['host']}" in words


def test_data_that_one_node_lacks_is_said_by_all(said):
    assert said["data"] == [f"rank 1 on {said['host']}: /data/photos is not there", "/data/photos is not there"]
