import resource
import weakref
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sendvae_fast.errors import UserError
from sendvae_fast.image_grid import image_grid, save_grid
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.sampling.writer import PngFolder, write_npz


def random_images(num, size=8):
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8)


def test_the_two_roundings():
    x = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 2.0])
    assert to_uint8(x, "truncate").tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
    assert to_uint8(x, "round").tolist() == [0, 0, 0, 128, 191, 255, 255, 255]
    # every grey level comes back from its float, under either rule
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.double() / 127.5 - 1, "round"), levels)
    # half a grey level of bias between the two
    dense = torch.linspace(-1, 1, 100_001)
    bias = to_uint8(dense, "round").double().mean() - to_uint8(dense, "truncate").double().mean()
    assert abs(bias - 0.5) < 0.01
    with pytest.raises(UserError, match="rounding"):
        to_uint8(x, "nearest")


def test_png_folder_keeps_pixels_and_names(tmp_path):
    folder, images = PngFolder(tmp_path / "new" / "samples"), random_images(3)
    assert folder.sample_ids() == []
    folder.write([2, 0, 1234567], images)
    assert sorted(path.name for path in folder.root.iterdir()) == ["000000.png", "000002.png", "1234567.png"]
    with Image.open(folder.path(2)) as image:
        assert np.array_equal(np.array(image), images[0].permute(1, 2, 0).numpy())
    assert folder.sample_ids() == [0, 2, 1234567]
    batches = list(folder.batches([1234567, 0, 2], batch_size=2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert torch.equal(torch.cat(batches), images[[2, 1, 0]])


def test_damaged_and_absent_pictures_are_missing(tmp_path):
    folder = PngFolder(tmp_path)
    folder.write(range(5), random_images(5, size=32))
    whole = folder.path(1).read_bytes()
    folder.path(1).write_bytes(whole[: len(whole) // 2])
    broken = bytearray(folder.path(2).read_bytes())
    broken[len(broken) // 2] ^= 0xFF
    folder.path(2).write_bytes(broken)
    folder.path(3).write_bytes(b"")
    assert folder.missing(range(7)) == [1, 2, 3, 5, 6]
    with pytest.raises(UserError, match="000005.png"):
        list(folder.batches([0, 5], batch_size=4))


def test_a_failed_write_is_heard_and_leaves_no_picture(tmp_path):
    folder = PngFolder(tmp_path)
    with pytest.raises(ValueError, match="zip"):
        folder.write([0, 1, 2], random_images(2))
    assert folder.missing(range(3)) == [0, 1, 2]


@contextmanager
def full_disk():
    """No file may grow beyond 4 KiB, as on a disk without room for more. Within it pytest itself must write nothing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    folder = PngFolder(tmp_path / "samples")
    folder.write([0], random_images(1, size=8))
    with pytest.raises(UserError, match=r"cannot write .*000001.png \(File too large\); mend that"), full_disk():
        folder.write([1], random_images(1, size=128))
    with pytest.raises(UserError, match=r"cannot write .*samples.npz \(File too large\)"), full_disk():
        write_npz(tmp_path / "samples.npz", random_images(100).split(7), num_images=100)
    with pytest.raises(UserError, match="grid.png"), full_disk():
        save_grid(tmp_path / "grid.png", random_images(4, size=64), columns=2)
    assert [path.name for path in folder.root.iterdir()] == ["000000.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*Not a directory"):
        PngFolder(tmp_path / "file" / "samples").write([0], random_images(1))


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        PngFolder(tmp_path / "file")


def test_npz_is_what_savez_writes(tmp_path):
    images = random_images(10)
    write_npz(tmp_path / "samples.npz", images.split(4), num_images=10)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], images.permute(0, 2, 3, 1).numpy())
    assert zipfile.ZipFile(tmp_path / "samples.npz").testzip() is None


def test_npz_takes_one_batch_at_a_time(tmp_path):
    given = []

    def batches():
        for _ in range(6):
            assert sum(batch() is not None for batch in given) <= 1
            images = random_images(2)
            given.append(weakref.ref(images))
            yield images
            del images

    write_npz(tmp_path / "samples.npz", batches(), num_images=12)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_npz_of_2000_pictures_takes_the_memory_of_a_batch(tmp_path):
    folder, num, size = PngFolder(tmp_path / "samples"), 2000, 96
    images = random_images(4, size)
    folder.write(range(4), images)
    for sample_id in range(4, num):  # the same four, again and again
        folder.path(sample_id).hardlink_to(folder.path(sample_id % 4))
    resident = []

    def batches():
        for batch in folder.batches(range(num), batch_size=50):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
            yield batch

    write_npz(tmp_path / "samples.npz", batches(), num)
    assert max(resident) - resident[4] < 0.25 * num * 3 * size**2  # all of them are 55 MB
    pixels = np.load(tmp_path / "samples.npz")["arr_0"]
    assert np.array_equal(pixels, images.permute(0, 2, 3, 1).numpy()[np.arange(num) % 4])


@pytest.mark.parametrize("num_images", [9, 11])
def test_npz_of_the_wrong_count_is_refused_and_not_left_behind(tmp_path, num_images):
    with pytest.raises(ValueError, match="was given 10"):
        write_npz(tmp_path / "samples.npz", random_images(10).split(4), num_images=num_images)
    assert list(tmp_path.iterdir()) == []


def test_image_grid():
    images = torch.stack([torch.full((3, 4, 6), level, dtype=torch.uint8) for level in (10, 20, 30)])
    sheet = image_grid(images, columns=2)
    assert sheet.shape == (4 + 2 + 4, 6 + 2 + 6, 3) and sheet.dtype == np.uint8
    assert (sheet[:4, :6] == 10).all() and (sheet[:4, 8:] == 20).all() and (sheet[6:, :6] == 30).all()
    assert (sheet[4:6] == 255).all() and (sheet[:, 6:8] == 255).all() and (sheet[6:, 8:] == 255).all()
