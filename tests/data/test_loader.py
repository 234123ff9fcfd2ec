import itertools
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sendvae_fast.data import loader
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.crop import read_crop
from sendvae_fast.data.decode import UnreadableImage
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.data.order import BatchSchedule
from sendvae_fast.errors import UserError

NUM = 23


@pytest.fixture
def catalog(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(NUM):
        path = tmp_path / f"class{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 25, 3), np.uint8)).save(path)
    return Catalog.open(tmp_path)


def same(first, second):
    return first.step == second.step and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first[1:], second[1:], strict=True)
    )


def test_batches_are_what_the_schedule_says(catalog):
    schedule = BatchSchedule(NUM, 4, seed=1)
    batches = list(ImageLoader(catalog, 16).batches(schedule, stop=12))
    assert [batch.step for batch in batches] == list(range(12))
    for batch in batches:
        assert np.array_equal(batch.ids.numpy(), schedule.ids(batch.step))
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, 16, 16)
        assert batch.ids.dtype == batch.labels.dtype == torch.int64
        for i, image, label in zip(batch.ids.tolist(), batch.images, batch.labels.tolist(), strict=True):
            assert label == catalog.labels[i]
            assert np.array_equal(image.numpy(), read_crop(catalog.locate(i), 16))


@pytest.mark.parametrize("num_threads, read_ahead, cache_mb", [(1, 0, 0), (1, 0, 64), (3, 5, 0), (8, 2, 64)])
def test_threads_read_ahead_and_cache_change_nothing(catalog, num_threads, read_ahead, cache_mb):
    schedule = BatchSchedule(NUM, 4, seed=1)
    config = LoaderConfig(num_threads=num_threads, read_ahead=read_ahead, cache_mb=cache_mb)
    got = list(ImageLoader(catalog, 16, config).batches(schedule, stop=12))
    truth = list(ImageLoader(catalog, 16).batches(schedule, stop=12))
    assert all(same(a, b) for a, b in zip(got, truth, strict=True))


def test_resume_at_any_step(catalog):
    schedule = BatchSchedule(NUM, 4, seed=1)
    truth = list(ImageLoader(catalog, 16).batches(schedule, stop=12))
    for start in (1, 5, 7):
        resumed = itertools.islice(ImageLoader(catalog, 16).batches(schedule, start=start), 12 - start)
        assert all(same(a, b) for a, b in zip(resumed, truth[start:], strict=True))


def test_ranks_split_the_global_batch(catalog):
    schedule = BatchSchedule(NUM, 4, seed=1)
    wholes = ImageLoader(catalog, 16).batches(schedule, stop=6)
    halves = [ImageLoader(catalog, 16).batches(schedule, stop=6, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(wholes, *halves, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))


def test_cached_crops_are_not_read_again(catalog, tmp_path):
    loader = ImageLoader(catalog, 16)
    first = list(loader.in_order(5))
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"")
    assert all(same(a, b) for a, b in zip(loader.in_order(5), first, strict=True))
    with pytest.raises(UserError):
        list(ImageLoader(catalog, 16, LoaderConfig(cache_mb=0)).in_order(5))


def test_in_order_reads_each_sample_once(catalog):
    batches = list(ImageLoader(catalog, 16).in_order(5, start=2, stop=20))
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(2, 20))
    assert [len(batch.ids) for batch in batches] == [5, 5, 5, 3]
    assert sum(len(batch.ids) for batch in ImageLoader(catalog, 16).in_order(6)) == NUM


def break_files(catalog, ids):
    for i in ids:
        with open(catalog.locate(i), "wb") as file:
            file.write(b"broken")


def test_an_unreadable_image_stops_the_run_with_its_name(catalog):
    break_files(catalog, [6])
    with pytest.raises(UserError, match=f"1 of 23 images: {catalog.locate(6)}.*same command again.*max_bad_fraction"):
        list(ImageLoader(catalog, 16).batches(BatchSchedule(NUM, 4, seed=1), stop=6))


@pytest.mark.parametrize("num_threads", [1, 6])
def test_substitution_shifts_no_other_sample(catalog, caplog, num_threads):
    schedule = BatchSchedule(NUM, 4, seed=1)
    truth = list(ImageLoader(catalog, 16).batches(schedule, stop=15))
    bad = [6, 7, 22]
    break_files(catalog, bad)
    with caplog.at_level(logging.WARNING):
        config = LoaderConfig(num_threads=num_threads, max_bad_fraction=0.2, cache_mb=0)
        got = list(ImageLoader(catalog, 16, config).batches(schedule, stop=15))
    substitute = {6: 8, 7: 8, 22: 0}
    for a, b in zip(got, truth, strict=True):
        for row, i in enumerate(b.ids.tolist()):
            used = substitute.get(i, i)
            assert int(a.ids[row]) == used and int(a.labels[row]) == catalog.labels[used]
            assert np.array_equal(a.images[row].numpy(), read_crop(catalog.locate(used), 16))
    assert sorted(record.args[0] for record in caplog.records) == sorted(catalog.locate(i) for i in bad)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_bad", [1, 7, 64])
def test_any_number_of_bad_files_shifts_nothing_on_any_number_of_ranks(tmp_path, monkeypatch, num_bad, world_size):
    """200 samples whose crop shows their id; the bad ones give way to the next good one and all others stay."""
    num = 200
    (tmp_path / "a").mkdir()
    for i in range(num):
        (tmp_path / "a" / f"{i:03d}.jpg").touch()
    catalog = Catalog.open(tmp_path)
    bad = set(np.random.default_rng(num_bad).choice(num, num_bad, replace=False).tolist())

    def read(self, i):
        if i in bad:
            raise UnreadableImage(self.locate(i), "it is bad")
        return i

    monkeypatch.setattr(Catalog, "read", read)
    monkeypatch.setattr(loader, "read_crop", lambda i, size, where: np.full((3, size, size), i, np.uint8))
    schedule = BatchSchedule(num, 24, seed=1)
    config = LoaderConfig(max_bad_fraction=0.5, cache_mb=0)
    ranks = [
        ImageLoader(catalog, 2, config).batches(schedule, stop=17, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        used = torch.cat([part.ids for part in parts]).tolist()
        assert torch.cat([part.images[:, 0, 0, 0] for part in parts]).tolist() == used
        for wanted, got in zip(schedule.ids(step).tolist(), used, strict=True):
            while wanted in bad:
                wanted = (wanted + 1) % num
            assert got == wanted


def test_too_many_unreadable_images_stop_the_run(catalog):
    break_files(catalog, [6, 7, 22])
    with pytest.raises(UserError, match=r"cannot read 3 of 23 images: .*\.jpg .*\.jpg .*\.jpg "):
        list(ImageLoader(catalog, 16, LoaderConfig(max_bad_fraction=0.1)).in_order(4))
    break_files(catalog, range(NUM))
    with pytest.raises(UserError, match=r"cannot read 23 of 23 images: .* and 18 more; remove or replace"):
        list(ImageLoader(catalog, 16, LoaderConfig(max_bad_fraction=0.99)).in_order(4))


def test_leaving_early_stops_the_threads(catalog):
    iterator = ImageLoader(catalog, 16).batches(BatchSchedule(NUM, 4, seed=1))
    next(iterator)
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    iterator.close()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_errors(catalog):
    with pytest.raises(UserError, match="for 9 samples but .* has 23 images"):
        ImageLoader(catalog, 16).batches(BatchSchedule(9, 3, 0))
    with pytest.raises(UserError, match="^loader.num_threads is 0"):
        LoaderConfig(num_threads=0)
    with pytest.raises(UserError, match="^loader.max_bad_fraction is 1.0"):
        LoaderConfig(max_bad_fraction=1.0)
