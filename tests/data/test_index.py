import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pictures import encoded, picture, write_folder, write_parquet, write_tar

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.indexing.index import default_catalog, index_source
from sendvae_fast.data.indexing.listing_parts import ListingParts
from sendvae_fast.errors import UserError

pytestmark = pytest.mark.slow


def files(num):
    return {f"n{k % 3}/{k:04d}.jpg": encoded(picture(8 + k % 50, 20, seed=k)) for k in range(num)}


def test_facts_are_those_of_the_files(tmp_path):
    others = {"n0/x.png": encoded(picture(5, 6, mode="L"), "PNG"), "n2/bad.jpg": b""}
    source = write_folder(tmp_path / "a", {**files(9), **others})
    assert index_source(source, tmp_path / "c.parquet", num_workers=2)
    catalog = Catalog.open(tmp_path / "c.parquet")
    plain = Catalog.open(source)
    assert catalog.names == plain.names and catalog.labels.tolist() == plain.labels.tolist()
    rows = dict(zip(catalog.names, catalog.facts.to_pylist(), strict=True))
    for name, data in files(9).items():
        expected = {
            "size": len(data),
            "sha256": hashlib.sha256(data).digest(),
            "width": 8 + int(name[3:7]) % 50,
            "height": 20,
            "mode": "RGB",
            "format": "JPEG",
            "verdict": "ok",
        }
        assert rows[name] == expected
    assert rows["n0/x.png"]["verdict"] == "odd: grey" and rows["n0/x.png"]["mode"] == "L"
    assert rows["n2/bad.jpg"]["verdict"] == "bad: the file is empty"
    assert catalog.is_bad.tolist() == [name == "n2/bad.jpg" for name in catalog.names]
    part = catalog.subset(np.array([3, 1]))
    assert part.facts.to_pylist() == [rows[catalog.names[3]], rows[catalog.names[1]]]
    assert part.verdicts.tolist() == [catalog.verdicts[3], catalog.verdicts[1]]


def test_parquet_is_read_in_its_own_order_and_indexed_by_id(tmp_path):
    rows = [(name, data, (7 * k) % 5) for k, (name, data) in enumerate(files(150).items())]
    source = write_parquet(tmp_path / "a.parquet", rows, row_group_size=10)
    index_source(source, tmp_path / "c.catalog.parquet", num_workers=2)
    catalog = Catalog.open(tmp_path / "c.catalog.parquet")
    assert sorted(catalog.labels) == catalog.labels.tolist()
    for sample_id in range(150):
        assert hashlib.sha256(catalog.read(sample_id)).digest() == catalog.facts["sha256"][sample_id].as_py()


def test_quick_does_not_decode(tmp_path):
    source = write_folder(tmp_path / "a", {"n/a.jpg": encoded()[:-50], "n/b.jpg": b"text"})
    index_source(source, tmp_path / "quick.parquet", quick=True)
    assert Catalog.open(tmp_path / "quick.parquet").verdicts.tolist()[0] == "ok"
    assert Catalog.open(tmp_path / "quick.parquet").is_bad.tolist() == [False, True]
    index_source(source, tmp_path / "full.parquet")
    assert Catalog.open(tmp_path / "full.parquet").is_bad.tolist() == [True, True]


def test_what_is_there_is_not_done_again(tmp_path):
    source, out = write_folder(tmp_path / "a", files(5)), tmp_path / "c.parquet"
    assert index_source(source, out) and not index_source(source, out)
    for options in ({"quick": True}, {}):
        if not options:
            write_folder(source, {"n1/new.jpg": encoded()})
        with pytest.raises(UserError, match="not the catalog of these pictures as they are now; remove it"):
            index_source(source, out, **options)
    with pytest.raises(UserError, match="is a catalog already"):
        index_source(out, tmp_path / "d.parquet")


def test_default_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_catalog("imagenet/train/") == tmp_path / "imagenet" / "train.catalog.parquet"
    with pytest.raises(UserError, match="is a pattern; say where its catalog goes"):
        default_catalog("a-{00..10}.tar")


def test_a_damaged_shard_is_catalogued_as_far_as_it_goes(tmp_path):
    path = write_tar(tmp_path / "a.tar", files(6))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(UserError, match="sendvae data index"):
        Catalog.open(path)
    index_source(path, tmp_path / "c.catalog.parquet")
    catalog = Catalog.open(tmp_path / "c.catalog.parquet")
    assert 0 < len(catalog) < 6 and "cut short at byte" in catalog.listing.damage[0]


def run_until(condition, *arguments):
    """Run the command in a session of its own and kill all of it as soon as `condition` holds."""
    command = [sys.executable, "-m", "sendvae_fast", *map(str, arguments)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not condition() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("num_parts", [0, 1, 4])
def test_a_killed_index_goes_on(tmp_path, monkeypatch, num_parts):
    source, out = write_folder(tmp_path / "a", files(400)), tmp_path / "c.parquet"
    parts = tmp_path / "c.parquet.parts"

    def far_enough():
        return (parts / "origin.json").exists() and len(list(parts.glob("part-*.parquet"))) >= num_parts

    run_until(far_enough, "data", "index", source, f"--out={out}", "--num_workers=1")
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert len(kept) >= num_parts
    with pytest.raises(UserError, match="finish that one, or remove the folder"):
        index_source(source, out, quick=True)
    seen = []
    monkeypatch.setattr(
        ListingParts,
        "remove",
        lambda self: seen.append({path.name: path.stat().st_mtime_ns for path in self.folder.glob("part-*.parquet")}),
    )
    assert index_source(source, out)
    assert kept.items() <= seen[0].items()  # none was done again
    index_source(source, tmp_path / "whole.parquet")
    assert Catalog.open(out).facts == Catalog.open(tmp_path / "whole.parquet").facts


def test_unwritable_places_are_named(tmp_path):
    source = write_folder(tmp_path / "a", files(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*give another --out"):
        index_source(source, tmp_path / "file" / "c.parquet")
