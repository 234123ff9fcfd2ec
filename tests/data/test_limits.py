"""What a picture may cost: every kind that costs more is refused by every reader, at once, and by the same words."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from broken_files import EOI, SOS, framed, many_scans, patched, png
from pictures import encoded, picture, write_folder
from PIL import Image

from sendvae_fast.cli.data_check import Config as CheckConfig
from sendvae_fast.cli.data_check import run as check_catalog
from sendvae_fast.data import limits
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import UnreadableImage, check, decode_rgb, examine
from sendvae_fast.data.indexing.index import index_source
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig

pytestmark = pytest.mark.slow

JPEG = encoded(picture(40, 30))
SLOW = "are too many for a"


def segments(number, payload, marker=b"\xff\xfe"):
    """A JPEG with `number` further segments at its beginning."""
    segment = marker + struct.pack(">H", len(payload) + 2) + payload
    return JPEG[:2] + segment * number + JPEG[2:]


def chunks(number, kind, payload):
    """A PNG with `number` further chunks before its pixels."""
    data = encoded(picture(), "PNG")
    chunk = struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))
    return data[:33] + chunk * number + data[33:]


def gif(number, introducer, block):
    """A GIF with `number` further extensions before its frame."""
    data = encoded(picture(), "GIF")
    start = data.index(b"\x2c\0\0\0\0")
    return data[:start] + (introducer + block + b"\0") * number + data[start:]


def bmp_of_runs(side):
    """A BMP of 8 bits coded in runs of 20, `side` x `side` pixels."""
    data = encoded(picture().convert("P"), "BMP")
    header = data[:18] + struct.pack("<ii", side, side) + data[26:30] + struct.pack("<I", 1) + data[34:1078]
    return header + (b"\x14\0" * (side // 20) + b"\0\0") * side


def tiff(count, kind=4, **options):
    """A TIFF whose first tag claims `count` values."""
    data = encoded(picture(), "TIFF", **options)
    (directory,) = struct.unpack_from("<I", data, 4)
    return data[: directory + 4] + struct.pack("<HI", kind, count) + data[directory + 10 :]


def scans(number, width, height):
    """A grey progressive JPEG that claims a size and has `number` scans."""
    data = encoded(Image.new("L", (64, 64)), progressive=True)
    data = patched(data, b"\xff\xc2", 5, struct.pack(">HH", height, width))
    own = data.count(SOS)
    last = data[data.rindex(SOS) : data.rindex(EOI)]
    return data[:-2] + last * (number - own) + EOI


OVER = {
    "JPEG with many scans": (many_scans(65), "more than 64 scans"),
    "large JPEG with several scans": (scans(33, 4096, 8192), "33 scans are too many for 4096 x 8192 pixels"),
    "JPEG with many segments": (segments(5000, b"x"), "segments are too many"),
    "JPEG with many EXIF segments": (segments(70, b"Exif\0\0II*\0", b"\xff\xe1"), "segments are too many"),
    "JPEG with many fill bytes": (JPEG[:2] + b"\xff" * 150_000 + JPEG[2:], "pieces to read"),
    "JPEG bomb": (framed(JPEG, 8193, 8192), "decompression bomb"),
    "PNG with many chunks": (chunks(45_000, b"tEXt", b"a\0b"), "pieces to read"),
    "PNG with many profiles": (
        chunks(300, b"iCCP", b"a\0\0" + zlib.compress(bytes(9))),
        "compressed texts and profiles",
    ),
    "PNG bomb": (png(8193, 8192, 8, 0, b""), "decompression bomb"),
    "GIF with many extensions": (gif(30_000, b"!\x01", b"\1a"), "pieces to read"),
    "P6 of few values": (b"P6 400 400 7 " + bytes(3 * 400 * 400), SLOW),
    "P5 of few values": (b"P5 400 400 7 " + bytes(400 * 400), SLOW),
    "P3": (b"P3 400 400 255 " + b"1 " * (3 * 400 * 400), SLOW),
    "P2 of comments": (b"P2 9 9 255 " + b"1 " * 81 + b"#\n" * 5000, "more than 1024 comments"),
    "PPM with a long comment": (b"P6 #" + b"x" * 150_000 + b"\n 9 7 255 " + bytes(3 * 9 * 7), "pieces to read"),
    "BMP of runs": (bmp_of_runs(400), SLOW),
    "TIFF of many strips": (tiff(2**21), "values are too many"),
    "TIFF of many bytes": (tiff(2**30, kind=1), "more bytes than the file"),
    "TIFF of JPEGs": (encoded(picture(), "TIFF", compression="jpeg"), "a TIFF compressed by jpeg"),
    "WebP bomb": (
        patched(encoded(picture(), "WEBP", lossless=True), b"VP8L", 9, struct.pack("<I", (16383 << 14) | 16383)),
        "decompression bomb",
    ),
}
UNDER = {
    "scans": scans(32, 4096, 4096),
    "segments": segments(300, bytes(9000)),
    "bytes of scans in an attachment": segments(300, b"\xff\xda" * 90),
    "a video after the end": JPEG + b"\xff\xda" * 1000,
    "PNG in small chunks": chunks(1000, b"tEXt", b"a\0b"),
    "GIF with extensions": gif(1000, b"!\x01", b"\3abc"),
    "small P6 of few values": b"P6 100 100 7 " + bytes(3 * 100 * 100),
    "P6": b"P6 400 400 255 " + bytes(3 * 400 * 400),
    "small BMP of runs": bmp_of_runs(40),
    "TIFF": encoded(picture(), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", OVER)
def test_what_is_over_a_limit_is_refused_at_once(kind):
    data, reason = OVER[kind]
    began = time.process_time()
    verdict = examine(data, "x.JPEG").verdict
    with pytest.raises(UnreadableImage) as of_training:
        decode_rgb(data)
    with pytest.raises(UnreadableImage) as before_dali:
        check(data, "x.JPEG")
    assert time.process_time() - began < 3  # each of the three looks: most of them take a millisecond
    assert verdict.startswith("bad: ") and reason in verdict
    assert {of_training.value.reason, before_dali.value.reason} == {verdict.removeprefix("bad: ")}


@pytest.mark.parametrize("kind", UNDER)
def test_what_is_under_the_limits_is_decoded_as_pillow_does(kind):
    truth = Image.open(io.BytesIO(UNDER[kind])).convert("RGB")
    assert np.array_equal(decode_rgb(UNDER[kind]), truth)
    assert not examine(UNDER[kind], "x.JPEG").verdict.startswith("bad")


def test_an_ordinary_jpeg_is_not_read_for_scans(monkeypatch):
    """Its first scan holds all of it: the markers before that one are all that is looked at."""
    seen = []
    monkeypatch.setattr(
        limits,
        "_MARKER",
        type("", (), {"search": lambda *at, of=limits._MARKER: seen.append(at) or of.search(*at[1:])})(),
    )
    limits.check_encoded(encoded(picture(400, 300)))
    assert len(seen) < 15


@pytest.fixture
def folder(tmp_path):
    """Every kind that is refused, between good pictures: (folder, what its files' verdicts should be)."""
    files, expected = {}, {}
    for number, (data, _) in enumerate(OVER.values()):
        for name, content in ((f"c/{number:02d}-bad.JPEG", data), (f"c/{number:02d}-good.JPEG", JPEG)):
            files[name], expected[name] = content, examine(content, name).verdict
    return write_folder(tmp_path / "pictures", files), expected


def passed_over(caplog):
    """Name to reason of the images that a loader passed over."""
    told = [record.args for record in caplog.records if "passing over" in record.msg]
    return {path.partition("/pictures/")[2]: f"bad: {reason}" for path, reason in told}


def test_index_check_and_training_agree(folder, tmp_path, capsys, caplog):
    folder, expected = folder
    out = tmp_path / "c.parquet"
    index_source(folder, out, num_workers=2)
    catalog = Catalog.open(out)
    assert dict(zip(catalog.names, catalog.verdicts, strict=True)) == expected
    assert check_catalog(CheckConfig(source=str(out))) == 1
    report = capsys.readouterr().out
    bad = {name: verdict for name, verdict in expected.items() if verdict.startswith("bad")}
    assert len(bad) == len(OVER) and all(f"{name}: {verdict}" in report for name, verdict in bad.items())
    unindexed = Catalog.open(folder)
    config = LoaderConfig(max_bad_fraction=0.6, num_threads=1)
    used = [i for batch in ImageLoader(unindexed, 8, config).in_order(6) for i in batch.ids.tolist()]
    assert passed_over(caplog) == bad
    good = [i for i, name in enumerate(unindexed.names) if name not in bad]
    assert used == [i for i in good for _ in range(2)]  # every bad one gives way to the good one after it


def test_dali_is_never_given_what_is_over_a_limit(folder, tmp_path, caplog, monkeypatch):
    """Files that were ordinary when they were indexed, and have been replaced since."""
    pytest.importorskip("nvidia.dali")
    from sendvae_fast.data.dali_decoder import DaliDecoder

    folder, expected = folder
    bad = [name for name, verdict in expected.items() if verdict.startswith("bad")]
    hostile = {name: (folder / name).read_bytes() for name in bad}
    write_folder(folder, dict.fromkeys(bad, JPEG))
    index_source(folder, tmp_path / "c.parquet", num_workers=1)
    write_folder(folder, hostile)
    given = []
    monkeypatch.setattr(
        DaliDecoder, "crops", lambda self, data, of=DaliDecoder.crops: given.extend(data) or of(self, data)
    )
    config = LoaderConfig(max_bad_fraction=0.6, num_threads=1, decoder="dali", cache_mb=0)
    loader = ImageLoader(Catalog.open(tmp_path / "c.parquet"), 8, config)
    assert sum(len(batch.ids) for batch in loader.in_order(8)) == len(expected)
    assert given and set(given) == {JPEG}
    assert passed_over(caplog) == {name: expected[name] for name in bad}
