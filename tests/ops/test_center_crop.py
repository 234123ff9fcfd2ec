import io
import itertools
import tarfile
import threading

import numpy as np
import pytest
import torch
from adm_crop import plain_adm_crop
from op_cases.center_crop import MEAN, STD, CropCase, require_order_of_passes, statistics
from op_cases.common import require_backend
from PIL import Image

from sendvae_fast.ops import center_crop, center_crop_batch, center_crop_reference, center_crops, use_backend
from sendvae_fast.ops.dispatch import chosen_backend

BACKENDS = ("reference", "cpu")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png")


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend("center_crop", request.param)
    with use_backend(request.param):
        yield request.param


def noise(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def assert_pillows(image, size, what):
    picture = torch.from_numpy(np.array(image))
    truth = torch.from_numpy(plain_adm_crop(image, size)).permute(2, 0, 1)
    assert torch.equal(center_crop(picture, size), truth), what
    assert torch.equal(center_crop(picture, size, flip=True), truth.flip(-1)), what


def photographs(folder):
    """(name, image) of every picture below `folder`, in archives too."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURE_ENDINGS:
            yield path.name, Image.open(path)
        elif path.suffix == ".tar":
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.name.lower().endswith(PICTURE_ENDINGS):
                        yield member.name, Image.open(io.BytesIO(archive.extractfile(member).read()))


def test_every_photograph_is_cropped_as_by_pillow(test_data):
    require_backend("center_crop", "cpu")
    count = 0
    with use_backend("cpu"):
        for name, opened in photographs(test_data / "photos"):
            image = opened.convert("RGB")
            for size in (64, 256):
                require_order_of_passes(image.height, image.width)
                assert_pillows(image, size, (name, size))
            count += 1
    assert count > 500


def random_shape(generator, number):
    """Height and width: any, a strip, or tiny."""
    long, short, tiny = (int(generator.integers(1, limit)) for limit in (1501, 31, 13))
    other = int(generator.integers(1, 1501))
    return [(long, other), (long, short), (short, long), (tiny, short), (other, long)][number % 5]


@pytest.mark.parametrize("part", range(8))
def test_random_sizes_are_cropped_as_by_pillow(part):
    require_backend("center_crop", "cpu")
    generator = np.random.default_rng(part)
    for number in range(25):
        height, width = random_shape(generator, number)
        size = int(generator.choice([1, 7, 32, 64, 100, 224, 256]))
        if max(height, width) / min(height, width) * size**2 > 2**23:  # Pillow makes the whole strip
            size = 16
        require_order_of_passes(height, width)
        with use_backend("cpu"):
            assert_pillows(Image.fromarray(noise(height, width, number).numpy()), size, (height, width, size))


def test_flat_and_extreme_pictures(backend):
    """Weights sum to one, and the overshoot of the bicubic filter is clipped."""
    for value in (0, 1, 127, 254, 255):
        assert (center_crop(torch.full((37, 53, 3), value, dtype=torch.uint8), 24) == value).all()
    checkers = (torch.arange(50)[:, None] // 5 + torch.arange(70) // 5) % 2 * 255
    image = checkers.to(torch.uint8)[..., None].expand(-1, -1, 3)
    assert_pillows(Image.fromarray(image.numpy()), 33, "checkers")


def test_halving_rounds_a_mean_of_four(backend):
    image = noise(64, 64)
    pairs = image.int().view(64, 32, 2, 3)
    rows = (pairs.sum(2) + 1) // 2  # each pass rounds halves up
    expected = (rows.view(32, 2, 32, 3).sum(1) + 1) // 2
    assert torch.equal(center_crop(image, 32).int(), expected.permute(2, 0, 1))


def test_the_middle_is_kept(backend):
    image = torch.arange(11, dtype=torch.uint8)[None, :, None].expand(4, -1, 3)
    assert center_crop(image, 4)[0, 0].tolist() == [3, 4, 5, 6]  # (11 - 4) // 2 on the left
    assert center_crop(image, 4, flip=True)[2, 3].tolist() == [6, 5, 4, 3]
    assert center_crop(image.transpose(0, 1), 4)[1, :, 2].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_value_is_that_of_plain_torch(backend, dtype):
    crop = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(-1, -1, 3)
    batch = center_crop_batch([crop, crop], 16, [False, True], dtype=dtype, **statistics("cpu"))
    x = torch.stack([crop, crop.flip(1)]).permute(0, 3, 1, 2).float()  # [2, 3, 16, 16]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for actual, expected in zip(batch, (x / 127.5 - 1, (x / 255 - mean) / std), strict=True):
        assert actual.dtype == dtype and actual.shape == x.shape
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(actual, expected.to(dtype))


def test_layouts_are_read_in_place_or_copied(backend):
    expected = noise(33, 47)
    for layout in ("window", "planes"):
        image = CropCase(((33, 47),), 16, layout).images("cpu", 0)[0]
        image.copy_(expected)
        assert torch.equal(center_crop(image, 16), center_crop(expected, 16))
    column = expected[:, :1].expand(-1, 47, -1)  # stride 0
    assert torch.equal(center_crop(column, 16), center_crop(column.contiguous(), 16))


def test_no_pictures(backend):
    batch = center_crop_batch([], 8, dtype=torch.bfloat16)
    assert batch.pixels.shape == (0, 3, 8, 8) and batch.pixels.dtype == torch.bfloat16 and batch.normalised is None
    assert center_crop_batch([], 8, **statistics("cpu")).normalised.shape == (0, 3, 8, 8)


def test_a_picture_is_the_same_alone_and_without_flips(backend):
    images = [noise(30 + i, 50 - i, i) for i in range(5)]
    batch = center_crop_batch(images, 16).pixels
    for image, pixels in zip(images, batch, strict=True):
        assert torch.equal(center_crop_batch([image], 16, [False]).pixels[0], pixels)
        assert torch.equal(center_crop(image, 16).float() / 127.5 - 1, pixels)


def test_crops_in_one_call_are_those_of_single_calls(backend):
    images, flips = [noise(9, 20), noise(13, 10), noise(16, 16)], [False, True, False]
    crops = center_crops(images, 8, flips)
    assert crops.dtype == torch.uint8 and crops.shape == (3, 3, 8, 8) and crops.is_contiguous()
    for crop, image, flip in zip(crops, images, flips, strict=True):
        assert torch.equal(crop, center_crop_reference(image, 8, flip))
    with pytest.raises(ValueError, match="at least one image"):
        center_crops([], 8)


def test_float64_takes_the_reference():
    images = [noise(20, 30)]
    batch = center_crop_batch(images, 8, dtype=torch.float64)
    assert torch.equal(batch.pixels[0], center_crop_reference(images[0], 8).double() / 127.5 - 1)


def test_many_threads_crop_at_once():
    require_backend("center_crop", "cpu")
    images = [noise(100 + i, 140, i) for i in range(8)]
    expected = [center_crop_reference(image, 32) for image in images]
    results = {}

    def work(worker):
        results[worker] = [torch.equal(center_crop(images[i], 32), expected[i]) for i in range(8) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert len(results) == 4 and all(itertools.chain(*results.values()))


def test_runs_where_the_picture_is():
    """A run forced to the other device's backend still crops where it decodes."""
    image = noise(20, 30)
    automatic = chosen_backend("center_crop", "cpu")
    with use_backend("cuda"):
        assert chosen_backend("center_crop", "cpu") == automatic
        assert torch.equal(center_crop(image, 8), center_crop_reference(image, 8))


@pytest.mark.parametrize(
    ("images", "size", "options", "message"),
    [
        ([torch.zeros(4, 4, 3)], 2, {}, "uint8"),
        ([torch.zeros(4, 4, 4, dtype=torch.uint8)], 2, {}, r"\[H, W, 3\]"),
        ([torch.zeros(4, 4, dtype=torch.uint8)], 2, {}, r"\[H, W, 3\]"),
        ([torch.zeros(0, 4, 3, dtype=torch.uint8)], 2, {}, "at least 1"),
        ([noise(4, 4)], 0, {}, "size"),
        ([noise(4, 4)], 2**16, {}, "size"),
        ([noise(4, 4), noise(4, 4).to("meta")], 2, {}, "one device"),
        ([noise(4, 4)], 2, dict(flips=[True, False]), "flips"),
        ([noise(4, 4)], 2, dict(dtype=torch.uint8), "dtype"),
        ([noise(4, 4)], 2, dict(mean=torch.zeros(3)), "together"),
        ([noise(4, 4)], 2, dict(mean=torch.zeros(3), std=torch.ones(1)), "std"),
        ([noise(4, 4)], 2, dict(mean=torch.zeros(3).double(), std=torch.ones(3)), "mean"),
        ([noise(4, 4)], 2, dict(mean=torch.zeros(3, device="meta"), std=torch.ones(3)), "mean is on meta"),
    ],
)
def test_bad_input_is_named(images, size, options, message):
    with pytest.raises(ValueError, match=message):
        center_crop_batch(images, size, **options)
    if not options and len(images) == 1:
        with pytest.raises(ValueError, match=message):
            center_crop(images[0], size)
