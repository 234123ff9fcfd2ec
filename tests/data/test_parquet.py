import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, picture, write_parquet

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import UnreadableImage
from sendvae_fast.data.sources import parquet as parquet_module
from sendvae_fast.data.sources.find import list_source
from sendvae_fast.errors import UserError

NAMES = ("tench, Tinca tinca", "goldfish", "a shark")


def rows(first, num):
    return [(f"n{k:04d}.JPEG", encoded(picture(seed=k)), (k * 2) % 3) for k in range(first, first + num)]


def test_the_layout_of_hugging_face(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows(0, 5), NAMES)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows(5, 4), NAMES)
    catalog = Catalog.open(tmp_path)
    truth = sorted(rows(0, 9), key=lambda row: (row[2], row[0]))
    assert catalog.class_names == NAMES  # in the order of their numbers, not sorted
    assert [(name, catalog.read(i), int(catalog.labels[i])) for i, name in enumerate(catalog.names)] == truth
    assert catalog.locate(0) == f"{tmp_path}/data/train-00000-of-00002.parquet ('n0000.JPEG' in row 0)"
    assert sorted(catalog.source.reading_order()) == list(range(9))


def test_numbers_without_names_and_rows_without_paths(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [(None, b"x", 2), ("/home/me/b.png", b"y", 0)])
    catalog = Catalog.open(path)
    assert catalog.class_names == ("0", "1", "2") and catalog.names == ["b.png", "a/000000"]
    assert list_source(path, "none").class_names == (tmp_path.name,)


def test_row_groups_are_dropped_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "MAX_CACHE_BYTES", 1500)
    catalog = Catalog.open(write_parquet(tmp_path / "a.parquet", rows(0, 12)))
    truth = {name: data for name, data, _ in rows(0, 12)}
    for i in np.random.default_rng(0).integers(0, 12, 60):
        assert catalog.read(i) == truth[catalog.names[i]]
        assert len(catalog.source._groups) <= 2


def test_clear_errors(tmp_path):
    with pytest.raises(UserError, match="class number -1"):
        Catalog.open(write_parquet(tmp_path / "test.parquet", [("a.jpg", b"x", -1)]))
    with pytest.raises(UserError, match="has the label 3, but there are 3 class names"):
        Catalog.open(write_parquet(tmp_path / "b.parquet", [("a.jpg", b"x", 3)], NAMES))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="no column image or img of struct<bytes, path>, but text"):
        Catalog.open(tmp_path / "c.parquet")
    path = write_parquet(tmp_path / "d.parquet", rows(0, 3))
    with pytest.raises(UserError, match="label='column:x' is not a place.*NAME is one of image, label"):
        list_source(path, "column:x")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read .*d.parquet as parquet.*fetch it again"):
        Catalog.open(path)
    catalog = Catalog.open(write_parquet(tmp_path / "e.parquet", [("a.jpg", None, 0)]))
    with pytest.raises(UnreadableImage, match="the row holds no bytes"):
        catalog.read(0)
