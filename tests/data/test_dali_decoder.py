"""DALI against Pillow, and what becomes of the batches that it fails."""

import io
import logging
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from sendvae_fast.data import loader as loader_module
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.crop import read_crop
from sendvae_fast.data.dali_decoder import MAX_BATCH, MAX_FAILURES, DaliDecoder, import_dali
from sendvae_fast.data.decode import examine
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.data.order import BatchSchedule
from sendvae_fast.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(import_dali() is None, reason="DALI is not installed"),
]
CPU = torch.device("cpu")
NUM = 23


def jpeg(seed: int, mode: str = "RGB", **options) -> bytes:
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
    smooth = blocks.resize((90 + seed, 70), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def indexed(catalog: Catalog) -> Catalog:
    """The catalog with what an index would know of each picture."""
    facts = [examine(catalog.read(i), catalog.names[i]) for i in range(len(catalog))]
    table = pa.table({"verdict": [fact.verdict for fact in facts], "format": [fact.format for fact in facts]})
    return Catalog(catalog.listing, facts=table)


PLACE = (
    "Error in MIXED operator `nvidia.dali.fn.decoders.image`,\nwhich was used in the pipeline definition with the "
    "following traceback:\n\n  File cuda/loader.py, line 3\n\n"
)
PICTURE_ERROR = RuntimeError(
    f"{PLACE}encountered:\n\nError in thread 0: Failed to decode sample #3\n\nCurrent pipeline object is invalid."
)


def decoder_that_raises(error: Exception) -> type[DaliDecoder]:
    """A decoder whose pipeline fails at every run."""

    def run(stream):
        raise error

    class Failing(DaliDecoder):
        def _build(self):
            pipeline = super()._build()
            pipeline.run = run
            return pipeline

    return Failing


@pytest.fixture
def folder(tmp_path):
    """Ordinary JPEGs, among them grey, CMYK and turned ones, and a PNG."""
    for i in range(NUM):
        path = tmp_path / f"class{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        mode = {3: "L", 4: "CMYK"}.get(i, "RGB")
        exif = Image.Exif()
        if i == 5:
            exif[0x0112] = 6
        path.write_bytes(jpeg(i, mode, exif=exif))
        if i == 6:
            Image.new("RGB", (40, 30), (1, 2, 3)).save(path, "PNG")
    return tmp_path


def crops_of(catalog, config, **arguments):
    loader = ImageLoader(catalog, 32, config)
    return list(loader.batches(BatchSchedule(NUM, 6, seed=1), stop=8, **arguments))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a[1:], b[1:], strict=True)
    )


def test_on_a_cpu_the_pixels_are_pillows(folder):
    encoded = [jpeg(i, subsampling=i % 3) for i in range(12)] + [jpeg(1, progressive=True)]
    for data, crop in zip(encoded, DaliDecoder(32, 1, CPU).crops(encoded), strict=True):
        assert torch.equal(crop, torch.from_numpy(read_crop(data, 32)))


def test_photographs_within_the_stated_bounds(test_data):
    """Mean 1/255, maximum 8/255 of Pillow, on photographs of every sort."""
    files = sorted((test_data / "photos" / "imagenet_1each").rglob("*.JPEG"))[:20]
    files += sorted((test_data / "photos" / "imagenet100x5").rglob("*.jpg"))[:40]
    encoded = [data for data in (file.read_bytes() for file in files) if examine(data, "x.jpg").verdict == "ok"]
    assert len(encoded) > 40
    for data, crop in zip(encoded, DaliDecoder(128, 1, CPU).crops(encoded), strict=True):
        error = (crop.int() - torch.from_numpy(read_crop(data, 128)).int()).abs()
        assert error.float().mean() <= 1 and error.max() <= 8


def test_more_pictures_than_a_batch():
    encoded = [jpeg(i % 5) for i in range(MAX_BATCH + 3)]
    crops = DaliDecoder(16, 1, CPU).crops(encoded)
    assert len(crops) == len(encoded) and torch.equal(crops[-1], crops[(len(encoded) - 1) % 5])


def test_a_failed_batch_leaves_a_decoder_that_works(caplog):
    decoder = DaliDecoder(16, 1, CPU)
    whole, cut = jpeg(0), jpeg(1)[:-400]
    for failures in range(1, MAX_FAILURES):
        assert decoder.crops([whole, cut]) is None
        assert decoder.num_failures == failures and not decoder.has_given_up
    assert len(decoder.crops([whole])) == 1 and decoder.num_failures == 0
    with caplog.at_level(logging.WARNING):
        for _ in range(MAX_FAILURES):
            assert decoder.crops([b"no picture at all"]) is None
    assert decoder.has_given_up
    assert "Pillow decodes this batch" in caplog.messages[0] and "from here on" in caplog.messages[-1]


@pytest.mark.parametrize("cache_mb", [0, 64])
def test_the_loader_gives_the_same_with_dali(folder, cache_mb):
    catalog = indexed(Catalog.open(folder))
    assert sorted(set(catalog.verdicts)) != ["ok"]
    truth = crops_of(catalog, LoaderConfig(decoder="pillow"))
    config = LoaderConfig(decoder="dali", cache_mb=cache_mb, num_threads=2)
    assert same(crops_of(catalog, config), truth)
    assert same(crops_of(catalog, config, start=3), truth[3:])


def test_files_that_broke_after_the_index(folder, caplog):
    """DALI fails on them; Pillow decodes the batch, says what is wrong, and the next good picture takes the place."""
    catalog = indexed(Catalog.open(folder))
    broken = [i for i in range(NUM) if catalog.verdicts[i] == "ok"][2:5:2]
    for i in broken:
        path = Path(catalog.locate(i))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    config = LoaderConfig(decoder="dali", cache_mb=0, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING):
        got = crops_of(catalog, config)
    assert same(got, crops_of(catalog, LoaderConfig(decoder="pillow", max_bad_fraction=0.2)))
    assert not set(torch.cat([batch.ids for batch in got]).tolist()) & set(broken)
    assert sum("DALI failed" in message for message in caplog.messages) >= 1


def test_a_dead_pipeline_changes_no_sample(folder, monkeypatch, caplog):
    catalog = indexed(Catalog.open(folder))
    truth = crops_of(catalog, LoaderConfig(decoder="pillow"))

    monkeypatch.setattr(loader_module, "DaliDecoder", decoder_that_raises(PICTURE_ERROR))
    with caplog.at_level(logging.WARNING):
        assert same(crops_of(catalog, LoaderConfig(decoder="dali", cache_mb=0)), truth)
    said = "DALI failed on a batch of 6 pictures (Error in thread 0: Failed to decode sample #3): Pillow"
    assert sum(said in message for message in caplog.messages) >= 1
    assert sum("DALI failed" in message for message in caplog.messages) == MAX_FAILURES


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError(f"{PLACE}encountered:\n\nCUDA runtime API error cudaErrorLaunchFailure (719):"),
        RuntimeError(f"{PLACE}encountered:\n\nCan't allocate 4294967296 bytes on device 0."),
        MemoryError("std::bad_alloc"),
    ],
    ids=["torch memory", "torch", "DALI", "DALI memory", "host memory"],
)
def test_a_failure_of_the_gpu_is_not_blamed_on_a_picture(folder, monkeypatch, error):
    catalog = indexed(Catalog.open(folder))
    monkeypatch.setattr(loader_module, "DaliDecoder", decoder_that_raises(error))
    with pytest.raises(type(error)) as raised:
        crops_of(catalog, LoaderConfig(decoder="dali", cache_mb=0))
    assert raised.value is error


def test_a_preview_in_the_middle_of_training_mixes_nothing_up(folder, monkeypatch):
    """One pipeline serves both, one batch at a time: what it is fed is what it gives back."""
    catalog = indexed(Catalog.open(folder))
    config = LoaderConfig(decoder="dali", cache_mb=0, num_threads=2)
    truth, preview = crops_of(catalog, config), list(ImageLoader(catalog, 32, config).in_order(8))
    decoders, overlaps = [], []

    class Exclusive(DaliDecoder):
        def __init__(self, *arguments):
            decoders.append(self)
            self.is_busy = False
            super().__init__(*arguments)

        def crops(self, encoded):
            overlaps.append(self.is_busy)
            self.is_busy = True
            time.sleep(0.02)
            crops = super().crops(encoded)
            self.is_busy = False
            return crops

    monkeypatch.setattr(loader_module, "DaliDecoder", Exclusive)
    loader = ImageLoader(catalog, 32, config)
    training = loader.batches(BatchSchedule(NUM, 6, seed=1), stop=8)
    got = [next(training)]
    assert same(list(loader.in_order(8)), preview)
    assert same(got + list(training), truth)
    assert len(decoders) == 1 and not any(overlaps)


def test_bad_pictures_that_the_catalog_knows_are_never_read(folder, monkeypatch):
    for i in (0, 7):
        (folder / f"class{i % 3}" / f"{i:02d}.jpg").write_bytes(b"broken")
    catalog = indexed(Catalog.open(folder))
    bad = set(np.flatnonzero(catalog.is_bad).tolist())
    assert len(bad) == 2
    read = set()
    monkeypatch.setattr(Catalog, "read", lambda self, i, of=Catalog.read: read.add(i) or of(self, i))
    for decoder in ("pillow", "dali"):
        crops_of(catalog, LoaderConfig(decoder=decoder, max_bad_fraction=0.1))
    assert read and not read & bad
    with pytest.raises(UserError, match="cannot read 2 of 23 images: .*not an image"):
        ImageLoader(catalog, 32, LoaderConfig())


def test_who_decodes(folder, monkeypatch):
    plain = Catalog.open(folder)
    with pytest.raises(UserError, match="sendvae data index"):
        ImageLoader(plain, 32, LoaderConfig(decoder="dali"))
    monkeypatch.setattr(loader_module, "import_dali", lambda: None)
    with pytest.raises(UserError, match="DALI is not installed"):
        ImageLoader(plain, 32, LoaderConfig(decoder="dali"))
    with pytest.raises(UserError, match="loader.decoder is .* it must be auto, pillow or dali"):
        LoaderConfig(decoder="nvjpeg")
