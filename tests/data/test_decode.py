import io
import os
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sendvae_fast.data.decode import UnreadableImage, decode_rgb, examine


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    "mode, extension",
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
        ("I;16", "PNG"),
        ("RGB", "WEBP"),
        ("P", "GIF"),
        ("RGB", "BMP"),
    ],
)
def test_every_mode_becomes_rgb_whatever_the_name(tmp_path, mode, extension):
    image = Image.new("I;16", (9, 7), 300) if mode == "I;16" else picture(9, 7).convert(mode)
    path = tmp_path / "misnamed.JPEG"
    image.save(path, format=extension)
    assert decode_rgb(path).mode == "RGB" and decode_rgb(path).size == (9, 7)


def test_exif_orientation_is_ignored(tmp_path):
    image, exif = picture(40, 20), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode_rgb(tmp_path / "turned.jpg").size == (40, 20)
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert ImageOps.exif_transpose(opened).size == (20, 40)  # the file does ask to be turned


def encoded(form, image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def jpeg_bytes():
    return encoded("JPEG", picture(64, 64))


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"\xff\xd8", ""),
        (b"<html>404</html>", "not an image"),
        (jpeg_bytes()[:2000], "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, ""),
        (b"\xff\xd8" + jpeg_bytes()[200:], ""),
    ],
)
def test_broken_files_are_named(tmp_path, content, reason):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage) as caught:
        decode_rgb(path)
    message = str(caught.value)
    assert str(path) in message and reason in message and "max_bad_fraction" in message and "\n" not in message


def test_the_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "broken")))
    assert (error.path, error.reason) == ("a.jpg", "broken") and "cannot read the image a.jpg: broken" in str(error)


def test_what_is_no_regular_file(tmp_path):
    with pytest.raises(UnreadableImage, match="does not exist"):
        decode_rgb(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UnreadableImage, match="directory"):
        decode_rgb(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        decode_rgb(tmp_path / "pipe.jpg")


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, reason",
    [
        (png_header(65500, 65500), "decompression bomb"),
        (png_header(8193, 8192), "decompression bomb: 8193 x 8192"),
        (png_header(1, 20000), "too unequal"),
    ],
)
def test_limits(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode_rgb(data)
    assert reason in examine(data, "a.png", quick=True).verdict


def test_what_is_decoded_through_further_buffers_counts_double():
    baseline, progressive = (encoded("JPEG", picture(8, 8), progressive=flag) for flag in (False, True))
    for data, verdict in ((baseline, "ok"), (progressive, "bad: decompression bomb: 8000 x 5000 pixels")):
        frame = data.index(b"\xff\xc2" if data is progressive else b"\xff\xc0")
        claims = data[: frame + 5] + (5000).to_bytes(2, "big") + (8000).to_bytes(2, "big") + data[frame + 9 :]
        assert examine(claims, "a.jpg", quick=True).verdict == verdict


def test_limits_leave_room_for_the_largest_photograph():
    assert examine(png_header(9331, 6530), "a.png", quick=True).verdict == "ok"
    assert decode_rgb(encoded("PNG", picture(1, 100))).size == (1, 100)


@pytest.mark.parametrize(
    "mode, form, options, verdict",
    [
        ("RGB", "JPEG", {}, "ok"),
        ("RGB", "JPEG", {"progressive": True}, "ok"),
        ("RGB", "JPEG", {"subsampling": 0}, "ok"),
        ("L", "JPEG", {}, "odd: grey"),
        ("CMYK", "JPEG", {}, "odd: CMYK"),
        ("RGB", "JPEG", {"keep_rgb": True}, "odd: stored as RGB, not YCbCr"),
        ("RGB", "PNG", {}, "odd: PNG named .JPEG"),
        ("RGBA", "PNG", {}, "odd: PNG named .JPEG, RGBA"),
        ("P", "GIF", {}, "odd: GIF named .JPEG, palette"),
        ("RGB", "WEBP", {}, "odd: WEBP named .JPEG"),
    ],
)
def test_verdicts(mode, form, options, verdict):
    data = encoded(form, picture(9, 7).convert(mode), **options)
    facts = examine(data, "n01/x.JPEG")
    assert facts == examine(data, "n01/x.JPEG", quick=True)
    assert facts.verdict == verdict and (facts.width, facts.height, facts.format) == (9, 7, form)
    assert np.array_equal(decode_rgb(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_truncated_jpeg_is_bad_but_its_header_is_not():
    data = jpeg_bytes()[:-200]
    assert examine(data, "a.jpg").verdict.startswith("bad: image file is truncated")
    assert examine(data, "a.jpg", quick=True).verdict == "ok"
