"""Odd, broken and hostile files: the verdict is the same wherever they lie, and none of them harms more than itself."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from broken_files import broken_files
from pictures import encoded, picture, write_folder, write_parquet, write_tar
from PIL import Image

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import UnreadableImage, decode_rgb, examine
from sendvae_fast.data.indexing.index import index_source

pytestmark = pytest.mark.slow

KINDS = broken_files()


def verdicts(source, out):
    index_source(source, out, num_workers=2)
    catalog = Catalog.open(out)
    return dict(zip(catalog.names, catalog.verdicts, strict=True)), catalog


def test_there_are_enough_kinds():
    assert len(KINDS) >= 24 and all(len(files) >= 3 for _, files in KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_verdict_and_pixels(kind):
    expected, files = KINDS[kind]
    for data in files:
        verdict = examine(data, "x.JPEG").verdict
        assert verdict.startswith(expected) and "\n" not in verdict
        if verdict.startswith("bad"):
            with pytest.raises(UnreadableImage) as caught:
                decode_rgb(data)
            assert f"bad: {caught.value.reason}" == verdict
        else:
            assert np.array_equal(decode_rgb(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_verdict_is_the_same_in_a_folder_a_tar_and_a_parquet_file(tmp_path):
    files = {
        f"c/{kind.replace(' ', '-').replace('/', '')}-{number}.JPEG": data
        for kind, (_, kind_files) in KINDS.items()
        for number, data in enumerate(kind_files)
    }
    rows = [(os.path.basename(name), data, 0) for name, data in files.items()]
    folder, _ = verdicts(write_folder(tmp_path / "folder", files), tmp_path / "folder.catalog.parquet")
    tar, _ = verdicts(write_tar(tmp_path / "a.tar", files), tmp_path / "tar.catalog.parquet")
    parquet, _ = verdicts(
        write_parquet(tmp_path / "a.parquet", rows, row_group_size=7), tmp_path / "parquet.catalog.parquet"
    )
    assert folder == {name: examine(data, name).verdict for name, data in files.items()}
    assert tar == folder and parquet == {os.path.basename(name): verdict for name, verdict in folder.items()}


def test_names_and_files_that_are_none(tmp_path):
    good = encoded(picture())
    names = ["line\nbreak.JPEG", "bad\udcff.JPEG", "x" * 250 + ".JPEG", "'quote\".JPEG"]
    root = write_folder(tmp_path / "n01", {f"c/{name}": good for name in names})
    (root / "c" / "dangling.JPEG").symlink_to(root / "gone")
    (root / "c" / "linked.JPEG").symlink_to(root / "c" / names[0])
    (root / "c" / "folder.JPEG").mkdir()
    os.mkfifo(root / "c" / "pipe.JPEG")
    (root / "c" / "mine.JPEG").write_bytes(good)
    (root / "c" / "mine.JPEG").chmod(0)
    found, catalog = verdicts(root, tmp_path / "c.parquet")
    assert [found.pop(f"c/{name}") for name in (*names, "linked.JPEG")] == ["ok"] * 5
    assert found.pop("c/dangling.JPEG") == "bad: the file does not exist"
    assert found.pop("c/pipe.JPEG") == "bad: not a regular file"
    assert found.pop("c/mine.JPEG") == ("ok" if os.geteuid() == 0 else "bad: Permission denied") and not found
    assert catalog.read(catalog.names.index("c/bad\udcff.JPEG")) == good


def test_real_odd_files(tmp_path):
    folder = os.environ.get("SENDVAE_TEST_DATA")
    if not folder:
        pytest.skip("SENDVAE_TEST_DATA is not set: no real odd files")
    found, catalog = verdicts(Path(folder, "jpeg"), tmp_path / "c.parquet")
    bad = {"libjpeg-turbo/monkey12.jpg", "pillow/truncated_jpeg.jpg", "pillow/ultrahdr.jpg"}
    assert {name for name, verdict in found.items() if verdict.startswith("bad")} == bad
    assert found["libjpeg-turbo/testimgari.jpg"] == "odd: arithmetic coding"
    assert found["pillow/pil_sample_cmyk.jpg"] == "odd: YCCK" and found["pillow/hopper_gray.jpg"] == "odd: grey"
    assert found["exif-orientation/Portrait_6.jpg"] == "odd: EXIF orientation 6 is ignored"
    assert found["exif-orientation/Portrait_1.jpg"] == found["pillow/junk_jpeg_header.jpg"] == "ok"
    for sample_id in np.flatnonzero(~catalog.is_bad):
        with Image.open(catalog.locate(sample_id)) as truth:
            assert np.array_equal(decode_rgb(catalog.read(sample_id)), truth.convert("RGB"))
