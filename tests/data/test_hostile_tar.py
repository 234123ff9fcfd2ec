"""Tars that mean harm: nothing is written, followed or read into memory, and what is intact is delivered."""

import gzip
import os
import tarfile
from contextlib import suppress

import numpy as np
import pytest
from pictures import encoded, picture, write_tar

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.indexing.index import index_source
from sendvae_fast.data.sources.find import list_source
from sendvae_fast.data.sources.tar_headers import read_tar_headers
from sendvae_fast.errors import UserError

PICTURE = encoded(picture())


def header(name, kind=tarfile.REGTYPE, size=0, link="", form=tarfile.GNU_FORMAT, pax=None):
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname, member.pax_headers = kind, size, link, pax or {}
    return member.tobuf(form)


def padded(data):
    return data + bytes(-len(data) % 512)


def regular(name, data=PICTURE, **options):
    return header(name, size=len(data), **options) + padded(data)


def with_size_field(field):
    block = bytearray(header("big.jpg"))
    block[124:136] = field
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(block)


def pax(payload, size=None):
    return header("pax", b"x", len(payload) if size is None else size, form=tarfile.USTAR_FORMAT) + padded(payload)


PASSED_OVER = {
    "parent folder": (regular("../../evil.jpg"), "outside the archive"),
    "absolute path": (regular("/tmp/evil.jpg"), "outside the archive"),
    "hidden parent": (regular("a/../../evil.jpg"), "outside the archive"),
    "symbolic link": (header("evil.jpg", tarfile.SYMTYPE, link="/etc/passwd"), "a symbolic link"),
    "hard link": (header("evil.jpg", tarfile.LNKTYPE, link="/etc/passwd"), "a hard link"),
    "named pipe": (header("evil.jpg", tarfile.FIFOTYPE), "a named pipe"),
    "character device": (header("evil.jpg", tarfile.CHRTYPE), "a character device"),
    "block device": (header("evil.jpg", tarfile.BLKTYPE), "a block device"),
    "sparse file": (header("evil.jpg", tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "pax sparse file": (pax(b"22 GNU.sparse.major=1\n") + regular("evil.jpg"), "a sparse file"),
    "duplicate": (regular("good.jpg"), "a second member of its name"),
    "NUL in the name": (pax(b"20 path=ev\0il\0.jpeg\n") + regular("x.jpg"), "without a usable name"),
    "unknown type": (regular("evil.jpg", kind=b"Z"), "of the unknown type 'Z'"),
}
DAMAGED = {
    "2^40 bytes": (with_size_field(b"\x80" + (2**40).to_bytes(11, "big")), "claims 1099511627776 bytes"),
    "2^70 bytes": (with_size_field(b"\x80" + (2**70).to_bytes(11, "big")), "claims"),
    "negative size": (with_size_field(b"\xff" * 11 + b"\0"), "no valid size"),
    "size that is no number": (with_size_field(b"elephants!!\0"), "no valid size"),
    "pax bomb": (pax(bytes(2**22)), "a header of 4194304 bytes"),
    "pax size beyond the end": (pax(b"16 size=99999999\n"[:16]) + regular("x.jpg"), "claims 9999999"),
    "pax record longer than the header": (pax(b"99 path=x\n") + regular("x.jpg"), "no valid pax header"),
    "long name bomb": (header("@", tarfile.GNUTYPE_LONGNAME, 2**40), "claims 1099511627776 bytes"),
    "truncated header": (regular("x.jpg")[:300], "the end mark is missing"),
    "no header": (b"garbage" * 500, "no valid header"),
}


@pytest.mark.parametrize("kind", PASSED_OVER)
def test_members_that_are_passed_over(tmp_path, kind):
    hostile, reason = PASSED_OVER[kind]
    path = tmp_path / "inside" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(regular("good.jpg") + hostile + regular("last.jpg") + bytes(1024))
    before = sorted(tmp_path.rglob("*"))
    contents = read_tar_headers(path)
    assert [member.name for member in contents.members] == ["good.jpg", "last.jpg"] and contents.damage is None
    assert len(contents.passed_over) == 1 and reason in contents.passed_over[0] and str(path) in contents.passed_over[0]
    catalog = Catalog.open(path)
    assert [catalog.read(i) for i in range(2)] == [PICTURE, PICTURE] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", DAMAGED)
def test_members_after_which_nothing_can_be_read(tmp_path, kind):
    hostile, reason = DAMAGED[kind]
    path = tmp_path / "a.tar"
    path.write_bytes(regular("good.jpg") + hostile + regular("last.jpg") + bytes(1024))
    if kind == "truncated header":
        path.write_bytes(regular("good.jpg") + hostile)
    with pytest.raises(UserError, match=rf"a.tar: .*({reason}).*fetch it again, or catalog what is left"):
        Catalog.open(path)
    assert [member.name for member in read_tar_headers(path).members][:1] == ["good.jpg"]


def test_a_cut_shard_is_named_with_the_place_and_what_comes_before_is_delivered(tmp_path):
    files = {f"{number:02d}.jpg": encoded(picture(20 + number, 30)) for number in range(10)}
    path = write_tar(tmp_path / "a.tar", files)
    whole = path.read_bytes()
    ends = {member.name: member.offset + member.size for member in read_tar_headers(path).members}
    end_mark = max(-(-end // 512) * 512 for end in ends.values())
    for offset in [*range(1, end_mark, end_mark // 22), 512, 1024, end_mark]:
        path.write_bytes(whole[:offset])
        contents = read_tar_headers(path)
        assert [member.name for member in contents.members] == [name for name, end in ends.items() if end <= offset]
        assert contents.damage.startswith(f"{path}: cut short at byte {offset}")
    out = tmp_path / "c.parquet"
    path.write_bytes(whole[: ends["07.jpg"] - 1])
    index_source(path, out, num_workers=1)
    catalog = Catalog.open(out)
    assert catalog.names == list(files)[:7] and not catalog.is_bad.any() and len(catalog.listing.damage) == 1


def test_pax_headers_of_a_million_records_take_no_time(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(pax(b"5 a=\n" * (2**20 // 5)) + regular("good.jpg") + bytes(1024))
    assert [member.name for member in read_tar_headers(path).members] == ["good.jpg"]


@pytest.mark.parametrize(
    "magic, name",
    [
        (b"\x1f\x8b\x08", "gzip"),
        (b"BZh9", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_compressed_tars_are_refused(tmp_path, magic, name):
    path = tmp_path / "a.tar"
    path.write_bytes(magic + bytes(2000))
    with pytest.raises(UserError, match=rf"is compressed \({name}\).*decompress it"):
        Catalog.open(path)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(UserError, match="is a file; give .*not compressed"):
        Catalog.open(tmp_path / "b.tar.gz")


def test_a_pipe_among_the_shards_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    write_tar(tmp_path / "a.tar", {"a.jpg": PICTURE})
    assert len(Catalog.open(tmp_path)) == 1
    with pytest.raises(UserError):
        list_source(tmp_path / "pipe.tar")


def test_damaged_headers_raise_nothing_but_user_errors(tmp_path):
    path = tmp_path / "a.tar"
    whole = pax(b"17 path=a/b.jpg\n\n"[:17]) + regular("x.jpg") + regular("a/b.cls", b"0") + bytes(1024)
    random = np.random.default_rng(0)
    for _ in range(500):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
        data[512:1024][random.integers(0, 20)] ^= 1  # in the records of the pax header, which no sum protects
        path.write_bytes(data.tobytes())
        with suppress(UserError):
            Catalog.open(path)
