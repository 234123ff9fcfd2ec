"""`sendvae data index`, `check` and `pack` as a user meets them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sendvae_fast.cli.main import main
from sendvae_fast.data.catalog import Catalog


@pytest.fixture
def photos(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3 + label):
            pixels = np.random.default_rng(10 * label + number).integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.jpg")
    return tmp_path / "photos"


def run(capsys, *arguments):
    """Exit code, stdout and the last line of stderr."""
    code = main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, (captured.err.strip().splitlines() or [""])[-1]


def test_index_check_and_pack(photos, capsys):
    catalog = f"{photos}.catalog.parquet"
    code, out, _ = run(capsys, "index", photos)
    assert code == 0 and out.splitlines()[0] == f"{catalog}: 7 samples in 2 classes" and "7  ok" in out
    assert run(capsys, "index", photos)[1].splitlines()[0].endswith("already there")
    code, out, _ = run(capsys, "check", catalog)
    assert code == 0 and "3  cat" in out and "4  dog" in out and "samples per class: 3 to 4" in out
    packed = photos.parent / "packed"
    code, out, _ = run(capsys, "pack", catalog, f"--out={packed}", "--shard_size=4", "--num_workers=1")
    assert code == 0 and out == f"{packed}: 7 samples in 2 shards\n"
    assert run(capsys, "pack", catalog, f"--out={packed}", "--shard_size=4")[1].endswith("already there\n")
    assert run(capsys, "check", packed)[0] == 0 and Catalog.open(packed).names == Catalog.open(photos).names


def test_check_finds_what_is_wrong(photos, capsys):
    (photos / "cat" / "cut.jpg").write_bytes((photos / "cat" / "0.jpg").read_bytes()[:-99])
    (photos / "cat" / "empty.jpg").write_bytes(b"")
    (photos / "cat" / "same.jpg").write_bytes((photos / "dog" / "1.jpg").read_bytes())
    Image.new("L", (20, 20)).save(photos / "dog" / "grey.png")
    code, out, _ = run(capsys, "check", photos)
    assert code == 1 and not list(photos.parent.glob("*.parquet"))
    for line in (
        "         1  bad: image file is truncated (N bytes not processed)",
        "         1  odd: grey",
        "bad and odd samples: 3",
        f"  {photos}/cat/empty.jpg: bad: the file is empty",
        "groups of samples with the same bytes: 1",
        f"  {photos}/cat/same.jpg = {photos}/dog/1.jpg",
    ):
        assert line in out.splitlines(), line
    assert out.index("cut.jpg") < out.index("grey.png")  # what is bad comes first
    run(capsys, "index", photos)
    code, out, _ = run(capsys, "check", f"{photos}.catalog.parquet", "--limit=1")
    assert code == 1 and "... and 2 more; raise --limit to see them" in out
    assert "`sendvae data check" in run(capsys, "index", photos)[1]


def test_check_lists_jpegs_that_libjpeg_warns_of(photos, capsys):
    """Pillow decodes all of them without a word."""
    data = (photos / "cat" / "0.jpg").read_bytes()
    (photos / "cat" / "damaged.jpg").write_bytes(data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :])
    Image.open(photos / "cat" / "damaged.jpg").load()
    for name, mode in (("grey", "L"), ("cmyk", "CMYK")):
        Image.new(mode, (20, 20)).save(photos / "dog" / f"{name}.jpg")
    (photos / "dog" / "cut.jpg").write_bytes(data[:-99])
    assert "libjpeg" not in run(capsys, "check", photos)[1]
    code, out, _ = run(capsys, "check", photos, "--jpeg_warnings")
    warned = out[out.index("JPEGs that libjpeg warns of: 1\n") :].splitlines()
    assert code == 1 and len(warned) == 2
    assert warned[1].startswith(f"  {photos}/cat/damaged.jpg: ") and "Corrupt JPEG data" in warned[1]
    for name in ("cat/damaged", "dog/cut"):
        (photos / f"{name}.jpg").unlink()
    code, out, _ = run(capsys, "check", photos, "--jpeg_warnings")
    assert code == 0 and "libjpeg" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["index", "nowhere"], "error: the image folder nowhere does not exist; check the path"),
        (["index", "a-{00..03}.tar"], "error: a-{00..03}.tar is a pattern; say where its catalog goes"),
        (["index", "PHOTOS", "--label=cls"], "leave label='cls' out"),
        (["index", "PHOTOS", "--num_workers=0"], "error: num_workers is 0: it must be at least 1"),
        (["index"], "source"),
        (["check"], "source"),
        (["pack", "x"], "out"),
        (["check", "PHOTOS", "--limit=-1"], "error: limit is -1"),
        (["pack", "PHOTOS", "--out=x"], "was not indexed; run `sendvae data index` on it"),
        (["pack", "PHOTOS", "--out=x", "--image_size=0"], "error: image_size is 0: it must be in [1, 8192]"),
        (["pack", "PHOTOS", "--out=x", "--imagesize=8"], "did you mean image_size?"),
        (["index", "PHOTOS", "--out=/proc/nothing/c.parquet"], "error: cannot write to /proc/nothing/c.parquet.parts"),
    ],
)
def test_bad_input_is_one_line(photos, capsys, arguments, message):
    code, _, line = run(capsys, *[photos if argument == "PHOTOS" else argument for argument in arguments])
    assert code == 2 and message in line and line.startswith("error: ")


@pytest.mark.parametrize(
    "verb, options",
    [
        ("index", ["--out", "--label", "--num_workers", "--quick"]),
        ("check", ["--limit", "--jpeg_warnings"]),
        ("pack", ["--image_size", "--shard_size", "--num_workers"]),
    ],
)
def test_help(capsys, verb, options):
    code, out, _ = run(capsys, verb, "--help")
    assert (
        code == 0
        and out.startswith(f"usage: sendvae data {verb} [")
        and all(f"  {option} " in out for option in options)
    )


def test_looking_at_pictures_does_not_wait_for_torch():
    """The verbs start many processes: they must start quickly."""
    code = "import sys, sendvae_fast.cli.data_index, sendvae_fast.cli.data_pack; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0
