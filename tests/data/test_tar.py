import errno
import json
import os
import pickle
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, picture, write_tar

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import UnreadableImage
from sendvae_fast.data.patience import read_patiently
from sendvae_fast.data.sources import tar as tar_module
from sendvae_fast.data.sources.find import list_source
from sendvae_fast.data.sources.tar_headers import read_tar_headers
from sendvae_fast.errors import UserError


def jpeg(seed):
    return encoded(picture(seed=seed))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, form):
    files = {f"n01/{'x' * length}_{length}.JPEG": os.urandom(length * 7) for length in (0, 1, 60, 73, 88)}
    files |= {f"{'d' * 90}/{'y' * 60}.jpg": b"prefix"}
    if form != tarfile.USTAR_FORMAT:
        files |= {f"{'long' * 60}.jpg": b"long", "grün/ä.jpg": b"umlaut", "bad\udcff.jpg": b"not UTF-8"}
    path = write_tar(tmp_path / "a.tar", files, form)
    contents = read_tar_headers(path)
    with tarfile.open(path) as truth:
        expected = [(member.name, member.offset_data, member.size) for member in truth]
    assert [(m.name, m.offset, m.size) for m in contents.members] == expected and len(expected) == len(files)
    assert contents.damage is None and contents.passed_over == []


def test_a_large_size_in_base_256(tmp_path):
    path = tmp_path / "a.tar"
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    path.write_bytes(bytes(header) + b"abc".ljust(512, b"\0") + bytes(1024))
    assert [(m.name, m.size) for m in read_tar_headers(path).members] == [("a.jpg", 3)]


def test_labels_in_cls_keep_their_numbers(tmp_path):
    first = {"01.jpg": jpeg(1), "01.cls": b"3", "00.json": b"{}", "00.cls": b"1\n", "00.jpg": jpeg(0)}
    write_tar(tmp_path / "s-000.tar", first)
    write_tar(tmp_path / "s-001.tar", {"02.png": encoded(form="PNG"), "02.cls": b"1"})
    catalog = Catalog.open(tmp_path)
    assert catalog.names == ["00.jpg", "02.png", "01.jpg"] and catalog.labels.tolist() == [1, 1, 3]
    assert catalog.class_names == ("0", "1", "2", "3") and catalog.labels.dtype == np.int64
    assert [catalog.read(i) for i in range(3)] == [jpeg(0), encoded(form="PNG"), jpeg(1)]
    assert catalog.locate(1) == f"{tmp_path / 's-001.tar'} ('02.png' at byte 512)"


def test_where_labels_may_come_from(tmp_path):
    files = {f"{name}.jpg": jpeg(k) for k, name in enumerate(("b/2", "a/1", "b/0"))}
    files |= {
        f"{name}.json": json.dumps({"wnid": wnid, "number": 7}).encode()
        for name, wnid in (("b/2", "n9"), ("a/1", "n8"), ("b/0", "n9"))
    }
    path = str(write_tar(tmp_path / "cats.tar", files))
    found = {label: list_source(path, label) for label in (None, "folder", "shard", "none", "json:wnid", "json:number")}
    assert {label: listing.class_names[-1] for label, listing in found.items()} == {
        None: "b",
        "folder": "b",
        "shard": "cats",
        "none": tmp_path.name,
        "json:wnid": "n9",
        "json:number": "7",
    }
    assert found[None].source.names == ["a/1.jpg", "b/0.jpg", "b/2.jpg"] and found[None].labels.tolist() == [0, 1, 1]
    assert found["json:wnid"].labels.tolist() == [0, 1, 1]


def test_imagenets_own_tars_are_classes(tmp_path):
    for wnid in ("n01440764", "n01443537"):
        write_tar(tmp_path / f"{wnid}.tar", {f"{wnid}_{k}.JPEG": jpeg(k) for k in (10, 9)})
    catalog = Catalog.open(tmp_path / "n*.tar")
    assert catalog.class_names == ("n01440764", "n01443537") and catalog.labels.tolist() == [0, 0, 1, 1]
    assert catalog.names[0] == "n01440764_10.JPEG"


@pytest.mark.parametrize(
    "files, label, message",
    [
        (
            {"a.jpg": b"", "a.cls": b"1", "b.jpg": b""},
            None,
            "'b.jpg' has no .cls beside it; add it or give another label",
        ),
        ({"a.jpg": b"", "a.cls": b"\xff"}, None, "the .cls beside it holds no label"),
        ({"a.jpg": b"", "a.cls": b""}, None, "the .cls beside it holds no label"),
        ({"a.jpg": b"", "a.cls": b"-1"}, None, "class number -1"),
        ({"a.jpg": b"", "a.cls": b"99999999999"}, None, "class number 99999999999"),
        (
            {"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "b.cls": b"n01"},
            None,
            "some classes are names and some are numbers",
        ),
        ({"a.jpg": b"", "a.json": b'{"x": 1.5}'}, "json:x", "field 'x' holds no label"),
        ({"a.jpg": b"", "a.json": b"[" * 100000}, "json:x", "field 'x' holds no label"),
        ({"a.jpg": b""}, "folder", "lies in no folder"),
        ({"a.jpg": b""}, "json", "label='json' is not a place for labels"),
        ({"a.txt": b""}, None, "no images in 1 tar shards"),
        ({"n01.tar": b"", "n02.tar": b""}, None, "they hold 2 further tars: unpack those first"),
    ],
)
def test_clear_errors(tmp_path, files, label, message):
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError, match=message):
        list_source(path, label)


def test_a_mask_beside_a_picture_is_no_picture(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), "a.mask.png": b"", "b.c.jpg": jpeg(1), "._a.jpg": b""})
    assert Catalog.open(tmp_path / "a.tar").names == ["a.jpg", "b.c.jpg"]


def test_patterns_splits_and_missing_shards(tmp_path):
    for name in ("train-00.tar", "train-01.tar", "validation-00.tar"):
        write_tar(tmp_path / name, {f"{name}/a.jpg": jpeg(0)})
    assert len(Catalog.open(str(tmp_path / "train-{00..01}.tar"))) == 2
    assert len(Catalog.open(str(tmp_path / "{train,validation}-0?.tar"))) == 3
    with pytest.raises(UserError, match=r"splits train, validation; give those of one, as in '.*\*train\*.tar'"):
        Catalog.open(tmp_path)
    with pytest.raises(UserError, match=r"train-02.tar does not exist \(2 missing\)"):
        Catalog.open(str(tmp_path / "train-{00..03}.tar"))
    with pytest.raises(UserError, match="nothing matches"):
        Catalog.open(str(tmp_path / "test-*.tar"))
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.jpg").write_bytes(jpeg(0))
    assert Catalog.open(tmp_path).class_names == ("class",)  # archives beside class folders are no shards


def test_many_threads_and_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "MAX_OPEN_SHARDS", 2)
    files = {f"{k:02d}.jpg": os.urandom(5000) for k in range(40)}
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", dict(list(files.items())[shard::8]))
    source = pickle.loads(pickle.dumps(Catalog.open(tmp_path).source))
    before = len(os.listdir("/proc/self/fd"))
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 40, 300):
            if source.read(i) != files[source.names[i]]:
                wrong.append(i)  # noqa: PERF401 - what was found before an error is kept

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_shard_that_changed_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    catalog = Catalog.open(path)
    os.truncate(path, 1500)
    with pytest.raises(UnreadableImage, match=r"a.tar \('b.jpg' at byte \d+\): the shard ends too early, at byte 1500"):
        catalog.read(1)
    path.unlink()
    with pytest.raises(UnreadableImage, match="does not exist"):
        Catalog(catalog.listing).subset(np.array([0])).read(0)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: os.truncate(path, 1500), "the shard has changed since it was first read"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "the shard has changed since it was first read"),
        (lambda path: os.replace(path.with_name("other.tar"), path), "the shard has changed since it was first read"),
        (lambda path: path.unlink(), "the file does not exist"),
    ],
    ids=["cut short", "written anew", "replaced", "gone"],
)
def test_a_shard_that_changes_under_a_job_is_never_read_as_if_it_were_the_old_one(tmp_path, monkeypatch, harm, reason):
    monkeypatch.setattr(tar_module, "MAX_OPEN_SHARDS", 0)  # every read opens its shard anew
    path = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    source = Catalog.open(path).source
    assert source.read(1) == jpeg(1)
    write_tar(tmp_path / "other.tar", {"b.jpg": jpeg(2), "a.jpg": jpeg(3)})
    harm(path)
    with pytest.raises(UnreadableImage, match=reason):
        source.read(1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_server_that_was_away_is_asked_again_with_a_new_descriptor(tmp_path, monkeypatch, number):
    source = Catalog.open(write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0)})).source
    tries, descriptors = [], []

    def read(descriptor, *arguments, of=os.pread):
        descriptors.append(os.fstat(descriptor))
        if len(descriptors) < 3:
            raise OSError(number, os.strerror(number))
        return of(descriptor, *arguments)

    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(tar_module.os, "open", lambda *at, of=os.open: tries.append(at) or of(*at))
    assert read_patiently(lambda: source.read(0)) == jpeg(0) and len(tries) == 3
    descriptors.clear()
    with pytest.raises(UnreadableImage, match="Input/output error|Stale"):
        read_patiently(lambda: source.read(0), patience_s=0.05)


def test_other_errors_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))

    def read():
        try:
            raise FileNotFoundError(errno.ENOENT, "gone")
        except OSError as error:
            raise UnreadableImage("x", "gone") from error

    with pytest.raises(UnreadableImage, match="gone"):
        read_patiently(read)


def test_a_real_shard_without_classes():
    folder = os.environ.get("SENDVAE_TEST_DATA")
    if not folder:
        pytest.skip("SENDVAE_TEST_DATA is not set: no real shard to read")
    path = Path(folder, "photos", "webdataset", "cc12m-train-0000.tar")
    catalog = Catalog.open(path)
    with tarfile.open(path) as tar:
        truth = {member.name: tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")}
    assert len(catalog) == 32 and catalog.class_names == ("webdataset",)
    assert {name: catalog.read(i) for i, name in enumerate(catalog.names)} == truth
    with pytest.raises(UserError, match="has no .cls beside it; add it or give another label: cls, json:FIELD, folder"):
        list_source(path, "cls")
