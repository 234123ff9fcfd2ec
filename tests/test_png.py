"""Reading of our own PNG files, and of what lies in their place."""

import random

import numpy as np
import pytest
from PIL import Image

from sendvae_fast.png import is_whole_png, read_png

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(started) = flush\nshowpage\n%%EOF\n"


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_pixels_come_back(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert is_whole_png(tmp_path / "a.png") and np.array_equal(read_png(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("kind", ["EPS", "JPEG", "nothing", "missing"])
def test_another_format_is_not_opened(tmp_path, pixels, kind, monkeypatch):
    path = tmp_path / "a.png"
    if kind == "JPEG":
        Image.fromarray(pixels).save(path, format="JPEG")
    elif kind != "missing":
        path.write_bytes(EPS if kind == "EPS" else b"")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    assert not is_whole_png(path)
    with pytest.raises(OSError, match="PNG|cannot identify|No such file"):
        read_png(path)


def test_a_damaged_file_is_an_oserror_or_a_picture(tmp_path, pixels):
    """Whatever bytes differ: only errors of one kind come out."""
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sound, draw = (tmp_path / "a.png").read_bytes(), random.Random(0)
    damaged = tmp_path / "b.png"
    for _ in range(200):
        content = bytearray(sound[: draw.choice([len(sound), draw.randrange(len(sound))])])
        for _ in range(draw.randrange(4) if content else 0):
            content[draw.randrange(len(content))] = draw.randrange(256)
        damaged.write_bytes(content)
        whole = is_whole_png(damaged)
        try:
            picture = read_png(damaged)
        except OSError:
            assert bytes(content) != sound
        else:
            assert picture.dtype == np.uint8 and picture.shape[2] == 3
        assert whole or bytes(content) != sound
