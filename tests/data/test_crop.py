import os
from pathlib import Path

import numpy as np
import pytest
from adm_crop import plain_adm_crop
from PIL import Image

from sendvae_fast.data.crop import center_crop, read_crop


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    "width, height",
    [
        (64, 64),
        (128, 128),
        (127, 128),
        (129, 300),
        (300, 129),
        (500, 375),
        (333, 500),
        (65, 64),
        (63, 200),
        (20, 31),
        (1, 1),
        (1, 50),
        (1000, 257),
    ],
)
def test_crop_follows_the_adm_protocol(width, height):
    image = picture(width, height)
    crop = center_crop(image, 64)
    assert crop.shape == (64, 64, 3) and crop.dtype == np.uint8
    assert np.array_equal(crop, plain_adm_crop(image, 64))


def test_an_exact_size_is_left_alone():
    image = picture(64, 64)
    assert np.array_equal(center_crop(image, 64), np.asarray(image))


def test_halving_is_a_box_mean():
    image = picture(128, 128)
    mean = np.asarray(image, np.float64).reshape(64, 2, 64, 2, 3).mean((1, 3))
    # Pillow rounds to whole grey levels after each of its two passes, at most half a level each.
    assert np.abs(center_crop(image, 64) - mean).max() <= 1.0


def test_crop_takes_the_middle():
    image = Image.new("RGB", (192, 64))
    image.paste((255, 0, 0), (64, 0, 128, 64))
    assert (center_crop(image, 64) == (255, 0, 0)).all()


def test_real_photographs():
    folder = os.environ.get("SENDVAE_TEST_DATA")
    if not folder:
        pytest.skip("SENDVAE_TEST_DATA is not set: no real photographs to crop")
    paths = sorted(Path(folder, "photos", "imagenet_1each").rglob("*.JPEG"))[:6]
    assert paths
    for path in paths:
        for size in (64, 256):
            with Image.open(path) as image:
                truth = plain_adm_crop(image.convert("RGB"), size)
            assert np.array_equal(read_crop(path, size).transpose(1, 2, 0), truth), path
    for name in ("Abyssinian_34.jpg", "Abyssinian_5.jpg"):  # really a GIF and an RGBA PNG
        assert read_crop(Path(folder, "photos", "pets", "Abyssinian", name), 64).shape == (3, 64, 64)
