"""Ranks that cannot meet say why, in one line on each, and do not wait for ever."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forks
import pytest
import torch.distributed as dist

from sendvae_fast.engine import rendezvous
from sendvae_fast.engine.launch import Place

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said():
    """What the ranks of each case say; see `rendezvous_worker.py`."""
    done = forks.run([Path(__file__).with_name("rendezvous_worker.py")])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_taken_port_is_said_by_rank_0_and_by_who_waits_for_it(said):
    first, second = said["taken"]
    assert f"rank 0 cannot listen at 127.0.0.1:PORT, because another process of {said['host']} does" in first
    assert second.startswith("cannot reach rank 0 at 127.0.0.1:PORT") and "look into the log of rank 0" in second


def test_who_waits_says_so_and_does_not_wait_to_the_end_for_a_program_that_is_no_rank_0(said):
    """Of the 300 s that ranks wait for one that is late."""
    ((waits, ends),) = (words.splitlines() for words in said["listening"])
    assert waits == f"rank 1 on {said['host']}: waiting at 127.0.0.1:PORT for rank 0, for 300 s at most"
    assert ends.startswith("who listens at 127.0.0.1:PORT is not rank 0") and "another MASTER_PORT" in ends


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


def meet_at(store, *ranks, size=3, wait_s=60.0, late=()):
    """The start that each of these ranks, threads here, found at the store; those in `late` come 0.3 s later."""
    deadline = time.monotonic() + wait_s

    def come(rank):
        time.sleep(0.3 if rank in late else 0.0)
        if rank == 0:
            return rendezvous._invite(store, size, deadline)
        return rendezvous._be_invited(store, Place(rank, size), deadline)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result() for future in [pool.submit(come, rank) for rank in ranks]]


@pytest.mark.parametrize("late", [(), (0,), (1, 2)])
def test_ranks_started_again_do_not_take_the_notes_of_the_last_start_for_their_own(late):
    """torchrun's store outlives the workers that it starts again (--max-restarts)."""
    store = dist.HashStore()
    starts = [meet_at(store, 0, 1, 2, late=late) for _ in range(3)]
    assert all(len(set(found)) == 1 for found in starts) and len({found[0] for found in starts}) == 3
    assert meet_at(store, 0, size=1)[0] not in {found[0] for found in starts}


def test_a_rank_that_does_not_come_again_is_waited_for():
    """Its word of the last start is there; ranks that took it for an answer would talk to a process that is gone."""
    store = dist.HashStore()
    meet_at(store, 0, 1, 2)
    with pytest.raises(dist.DistError):
        meet_at(store, 0, 1, wait_s=1.0)
    with pytest.raises(dist.DistError):
        meet_at(store, 1, 2, wait_s=1.0)  # nor is an invitation to the last start one to this


def test_a_process_that_comes_in_the_place_of_one_that_died_waiting():
    store = dist.HashStore()
    store.set("here/1", "dead")
    assert len(set(meet_at(store, 0, 1, 2, late=(1,)))) == 1
