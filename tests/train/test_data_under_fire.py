"""Training whose pictures lie on a disk that is slow, fails for a while, or has its shards changed under the run."""

import errno
import itertools
import os
import random
import shutil
import tarfile
import threading
import time

import pytest
import torch
from tiny_runs import checkpoint_tensors, vae_config

from sendvae_fast.data import patience
from sendvae_fast.data.sources import tar
from sendvae_fast.errors import UserError
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    """The pictures of `images` in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    for number in (0, 1):
        with tarfile.open(folder / f"{number}.tar", "w") as shard:
            for path in sorted(images.rglob("*.jpg"))[number::2]:
                shard.add(path, path.relative_to(images))
    return folder


def train(run, shards, **data):
    settings = {"data": {"cache_mb": 0, "read_ahead": 1, **data}, "loop": {"num_steps": STEPS, "save_every": 2}}
    return train_vae(vae_config(run, shards, **settings))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The last checkpoint of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(run, shards) == 0
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
    assert train(run, shards) == 0
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
        train(run, mine)
    assert checkpoint_tensors(run, 2)
    shutil.copy(shards / "0.tar", mine / "0.tar")
    assert train(run, mine) == 0
    assert equal(checkpoint_tensors(run, STEPS), undisturbed)
