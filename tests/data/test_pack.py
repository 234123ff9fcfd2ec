import hashlib
import shutil
import tarfile

import numpy as np
import pytest
from pictures import encoded, picture, write_folder, write_parquet, write_tar
from PIL import Image

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.crop import read_crop
from sendvae_fast.data.indexing.index import index_source
from sendvae_fast.data.indexing.pack import pack_catalog
from sendvae_fast.data.latents.shard_format import file_list_sha256
from sendvae_fast.errors import UserError

pytestmark = pytest.mark.slow


def files(num=11):
    pictures = {f"n{k % 3}/p.{k:02d}.JPEG": encoded(picture(40 + k, 33, seed=k)) for k in range(num)}
    return pictures | {"n0/cut.jpg": encoded()[:-40], "n1/grey.png": encoded(picture(40, 40, mode="L"), "PNG")}


def indexed(source, out):
    index_source(source, out, num_workers=1)
    return Catalog.open(out)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def sources(tmp_path):
    yield write_folder(tmp_path / "folder", files())
    yield write_tar(tmp_path / "tar" / "a.tar", files())
    rows = [(name, data, int(name[1])) for name, data in files().items()]
    yield write_parquet(tmp_path / "parquet" / "a.parquet", rows)


def test_packing_and_reading_back_gives_the_same_samples(tmp_path):
    for number, source in enumerate(sources(tmp_path)):
        catalog = indexed(source, tmp_path / f"{number}.catalog.parquet")
        out = tmp_path / f"packed{number}"
        assert pack_catalog(catalog, out, shard_size=4, num_workers=1)
        packed = Catalog.open(out)
        assert len(list(out.glob("*.tar"))) == 4 and min(path.suffix for path in out.iterdir()) == ".parquet"
        assert packed.names == catalog.names and packed.class_names == catalog.class_names
        assert packed.labels.tolist() == catalog.labels.tolist() and packed.facts == catalog.facts
        assert [packed.read(i) for i in range(13)] == [catalog.read(i) for i in range(13)]
        assert file_list_sha256(packed) == file_list_sha256(catalog)  # latents of one are latents of the other
        # Without the catalog in the folder, as other programs see the shards: the same ids, the classes by number.
        bare = Catalog.open(str(out / "shard-*.tar"))
        assert [bare.read(i) for i in range(13)] == [catalog.read(i) for i in range(13)]
        assert bare.labels.tolist() == catalog.labels.tolist() and bare.names[3].startswith("000000003.")
        again = indexed(str(out / "shard-*.tar"), tmp_path / f"again{number}.catalog.parquet")
        assert again.verdicts.tolist() == catalog.verdicts.tolist()


def test_shards_are_webdataset_and_their_bytes_are_fixed(tmp_path):
    catalog = indexed(write_folder(tmp_path / "a", files()), tmp_path / "c.parquet")
    pack_catalog(catalog, tmp_path / "one", shard_size=5, num_workers=1)
    pack_catalog(catalog, tmp_path / "two", shard_size=5, num_workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") and len(hashes(tmp_path / "one")) == 3
    with tarfile.open(tmp_path / "one" / "shard-00001.tar") as tar:
        members = tar.getmembers()
        assert [m.name.partition(".")[0] for m in members] == [f"{k // 2 + 5:09d}" for k in range(10)]
        assert {m.name.partition(".")[2] for m in members} == {"JPEG", "png", "cls"}
        assert int(tar.extractfile(members[1]).read()) == catalog.labels[5]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}


def test_crops_are_packed_without_loss(tmp_path):
    catalog = indexed(write_folder(tmp_path / "a", files()), tmp_path / "c.parquet")
    pack_catalog(catalog, tmp_path / "crops", image_size=16, num_workers=1)
    packed = Catalog.open(tmp_path / "crops")
    assert packed.is_bad.tolist() == catalog.is_bad.tolist() and packed.is_bad.sum() == 1
    for sample_id in np.flatnonzero(~catalog.is_bad):
        assert np.array_equal(read_crop(packed.read(sample_id), 16), read_crop(catalog.read(sample_id), 16))
        row = packed.facts.slice(sample_id, 1).to_pylist()[0]
        assert row["sha256"] == hashlib.sha256(packed.read(sample_id)).digest()
        assert (row["width"], row["height"], row["mode"], row["format"], row["verdict"]) == (16, 16, "RGB", "PNG", "ok")
    bad = int(np.flatnonzero(packed.is_bad)[0])
    assert packed.verdicts[bad] == catalog.verdicts[bad] and packed.read(bad) == catalog.read(bad)


def test_attributes_go_along(tmp_path):
    source = write_folder(tmp_path / "a", {"n/a.jpg": encoded(), "n/b,c.jpg": encoded()})
    (source / "attributes.csv").write_text('file,round,warm\n"n/b,c.jpg",0,1\nn/a.jpg,1,1\n')
    catalog = indexed(source, tmp_path / "c.parquet")
    pack_catalog(catalog, tmp_path / "out", num_workers=1)
    packed = Catalog.open(tmp_path / "out").attributes
    assert packed.names == ("round", "warm") and packed.values.tolist() == [[True, True], [False, True]]


def test_an_interrupted_pack_goes_on(tmp_path):
    catalog = indexed(write_folder(tmp_path / "a", files()), tmp_path / "c.parquet")
    pack_catalog(catalog, tmp_path / "whole", shard_size=2, num_workers=1)
    out = tmp_path / "out"
    hidden = tmp_path / "a" / catalog.names[8]
    data = hidden.read_bytes()
    hidden.unlink()
    with pytest.raises(UserError, match="does not exist"):
        pack_catalog(catalog, out, shard_size=2, num_workers=1)
    assert not (out / "catalog.parquet").exists() and not list(out.glob("*.tmp"))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(kept) < 7
    hidden.write_bytes(data)
    with pytest.raises(UserError, match="with other options; finish that one"):
        pack_catalog(catalog, out, shard_size=3, num_workers=1)
    assert pack_catalog(catalog, out, shard_size=2, num_workers=1)
    assert hashes(out) == hashes(tmp_path / "whole") and not (out / ".parts").exists()
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not pack_catalog(catalog, out, shard_size=2)
    with pytest.raises(UserError, match="holds shards of other samples or options"):
        pack_catalog(catalog, out, shard_size=3)


def test_a_part_of_a_catalog_in_any_order_keeps_its_ids(tmp_path):
    catalog = indexed(write_folder(tmp_path / "a", files()), tmp_path / "c.parquet").subset(np.array([7, 0, 10, 3]))
    pack_catalog(catalog, tmp_path / "out", num_workers=1)
    packed = Catalog.open(tmp_path / "out")
    assert [packed.read(i) for i in range(4)] == [catalog.read(i) for i in range(4)]
    assert packed.labels.tolist() == catalog.labels.tolist() and packed.names == catalog.names


def test_packed_shards_may_move(tmp_path):
    catalog = indexed(write_folder(tmp_path / "a", files(3)), tmp_path / "c.parquet")
    pack_catalog(catalog, tmp_path / "out", num_workers=1)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert Catalog.open(tmp_path / "elsewhere").read(0) == catalog.read(0)


def test_errors(tmp_path):
    source = write_folder(tmp_path / "a", {"n/a.jpg": encoded()})
    with pytest.raises(UserError, match="was not indexed; run `sendvae data index`"):
        pack_catalog(Catalog.open(source), tmp_path / "out")
    catalog = indexed(source, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="holds something else"):
        pack_catalog(catalog, source)
    Image.new("RGB", (9, 9)).save(source / "n" / "a.jpg")
    with pytest.raises(UserError, match="a.jpg has changed since it was indexed"):
        pack_catalog(catalog, tmp_path / "out", num_workers=1)
