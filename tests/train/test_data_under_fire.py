"""Training whose pictures lie on a disk that is slow, fails for a while, or has its shards changed under the run.

And training whose decoder dies: a thread of the loader, or DALI's pipeline.
"""

import errno
import itertools
import os
import random
import shutil
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from dying_decoders import dead_pipeline, dead_thread, train
from reliability_counts import full_counts
from tiny_runs import checkpoint_tensors
from two_ranks import run_on_two_ranks

from sendvae_fast.data import patience
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.dali_decoder import import_dali
from sendvae_fast.data.indexing.listing_parts import ListingParts
from sendvae_fast.data.indexing.sandbox import examine_sample
from sendvae_fast.data.sources import tar
from sendvae_fast.engine import watchdog
from sendvae_fast.engine.watchdog import EXIT_STUCK
from sendvae_fast.errors import UserError

pytestmark = pytest.mark.slow

STEPS = 6
ON_TWO_RANKS = Path(__file__).with_name("dying_decoders.py")


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    """The pictures of `images` in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    for number in (0, 1):
        with tarfile.open(folder / f"{number}.tar", "w") as shard:
            for path in sorted(images.rglob("*.jpg"))[number::2]:
                shard.add(path, path.relative_to(images))
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The last checkpoint of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(run, shards, STEPS) == 0
    return checkpoint_tensors(run, STEPS)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_slow_and_failing_file_server_changes_nothing(undisturbed, shards, tmp_path, monkeypatch, caplog):
    """Every third read fails as NFS does, some twice in a row; the others take up to 20 ms."""
    draw, lock, failures = random.Random(0), threading.Lock(), []

    def read(*arguments, of=os.pread):
        if not threading.current_thread().name.startswith("decode"):
            return of(*arguments)  # of the headers, before the run
        with lock:
            fails, delay_s = draw.random() < 0.33, draw.random() * 0.02
        time.sleep(delay_s)
        if fails:
            failures.append(errno.ESTALE if len(failures) % 2 else errno.EIO)
            raise OSError(failures[-1], os.strerror(failures[-1]))
        return of(*arguments)

    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(os, "pread", read)
    run = tmp_path / "run"
    assert train(run, shards, STEPS) == 0
    assert len(failures) > 10 and "reading it again" in caplog.text and "passing over" not in caplog.text
    assert equal(checkpoint_tensors(run, STEPS), undisturbed)


def test_a_shard_that_is_replaced_is_named_and_the_run_goes_on(undisturbed, shards, tmp_path, monkeypatch):
    """Half-way; descriptors are closed and opened again, as they are where there are many shards."""
    mine, run, reads = tmp_path / "shards", tmp_path / "run", itertools.count()
    shutil.copytree(shards, mine)
    monkeypatch.setattr(tar, "MAX_OPEN_SHARDS", 1)

    def read(self, index, of=tar.TarSource.read):
        if next(reads) == 8 * 4:
            shutil.copy(mine / "1.tar", mine / "new")
            os.replace(mine / "new", mine / "0.tar")
        return of(self, index)

    monkeypatch.setattr(tar.TarSource, "read", read)
    with pytest.raises(UserError, match=r"cannot read 1 of 24 images: .*0\.tar .*has changed since .*same command"):
        train(run, mine, STEPS)
    assert checkpoint_tensors(run, 2)
    shutil.copy(shards / "0.tar", mine / "0.tar")
    assert train(run, mine, STEPS) == 0
    assert equal(checkpoint_tensors(run, STEPS), undisturbed)


def decoding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_a_thread_of_the_loader_that_dies_ends_the_run_which_goes_on(undisturbed, shards, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(*dead_thread(8 * 4))
        with pytest.raises(RuntimeError, match="planted"):
            train(run, shards, STEPS)
    assert decoding_threads() == [] and checkpoint_tensors(run, 2)
    assert train(run, shards, STEPS) == 0
    assert equal(checkpoint_tensors(run, STEPS), undisturbed)


def test_a_thread_of_the_loader_that_hangs_is_named_and_the_run_goes_on(undisturbed, shards, tmp_path, monkeypatch):
    """As a read that never returns does. The process would end: here its exit is noted, and then the thread fails."""
    codes, dogs, given_up, run = [], [], threading.Event(), tmp_path / "run"

    def leave(code):
        codes.append(code)
        given_up.set()

    def hang():
        dogs[0]._limit_s = dogs[0]._longest_s = 0.1  # only now: on a busy machine any step may take long
        assert given_up.wait(600), "nobody noticed"
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "BEAT_S", 0.05)
        patch.setattr(
            watchdog.Watchdog, "__enter__", lambda dog, of=watchdog.Watchdog.__enter__: dogs.append(dog) or of(dog)
        )
        patch.setattr(os, "_exit", leave)
        patch.setattr(*dead_thread(8 * 4, hang))
        with pytest.raises(RuntimeError, match="planted"):
            train(run, shards, STEPS)
    assert codes == [EXIT_STUCK]
    assert " in hang" in (run / "stacks_rank0.txt").read_text()
    assert train(run, shards, STEPS) == 0
    assert equal(checkpoint_tensors(run, STEPS), undisturbed)


@pytest.fixture(scope="module")
def catalog(shards, tmp_path_factory):
    """The pictures of `shards` with what an index knows of them, so that DALI may decode them."""
    folder, listed = tmp_path_factory.mktemp("catalog"), Catalog.open(shards)
    parts = ListingParts(folder / "parts", listed.listing, len(listed), {"indexed": "a"})
    parts.write(0, [examine_sample(listed.source, index) for index in parts.ids(0).tolist()])
    Catalog(listed.listing, listed.attributes, parts.collect()).save(folder / "catalog.parquet")
    return folder / "catalog.parquet"


@pytest.mark.skipif(import_dali() is None, reason="DALI is not installed")
def test_a_dead_pipeline_of_dali_changes_nothing(undisturbed, catalog, tmp_path, monkeypatch, caplog):
    runs = itertools.count()
    monkeypatch.setattr(*dead_pipeline(runs))
    assert train(tmp_path / "dali", catalog, STEPS, decoder="dali") == 0
    assert sum("DALI failed on a batch of 8 pictures (planted)" in message for message in caplog.messages) == 1
    assert next(runs) >= STEPS, "the batches after it were DALI's again"
    assert equal(checkpoint_tensors(tmp_path / "dali", STEPS), undisturbed)


@pytest.fixture(scope="module")
def undisturbed_pair(shards, tmp_path_factory):
    """As `undisturbed`, of two ranks."""
    run = tmp_path_factory.mktemp("pairs") / "undisturbed"
    assert run_on_two_ranks(ON_TWO_RANKS, run, shards, STEPS, "nothing", 0).returncode == 0
    return checkpoint_tensors(run, STEPS)


@pytest.mark.skipif(not full_counts(), reason="make reliability")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_thread_on_one_of_two_ranks_ends_both_and_the_run_goes_on(undisturbed_pair, shards, tmp_path, victim):
    done = run_on_two_ranks(ON_TWO_RANKS, tmp_path / "run", shards, STEPS, "a dead thread", victim)
    assert done.returncode != 0 and "planted" in done.stderr, done.stderr[-2000:]
    assert checkpoint_tensors(tmp_path / "run", 2)
    assert run_on_two_ranks(ON_TWO_RANKS, tmp_path / "run", shards, STEPS, "nothing", 0).returncode == 0
    assert equal(checkpoint_tensors(tmp_path / "run", STEPS), undisturbed_pair)


@pytest.mark.skipif(not full_counts() or import_dali() is None, reason="make reliability, where DALI is installed")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_pipeline_on_one_of_two_ranks_changes_nothing(undisturbed_pair, catalog, tmp_path, victim):
    done = run_on_two_ranks(ON_TWO_RANKS, tmp_path / "run", catalog, STEPS, "a dead pipeline", victim)
    assert done.returncode == 0 and "(planted)" in done.stderr + done.stdout, done.stderr[-2000:]
    assert equal(checkpoint_tensors(tmp_path / "run", STEPS), undisturbed_pair)
