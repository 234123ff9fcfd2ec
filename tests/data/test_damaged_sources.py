"""Damaged files of pictures' sources, catalogs and latents: each reader takes them or raises a `UserError` of one line.

A single picture that cannot be read is `UnreadableImage`, which the loader counts.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzz import Reader, check_reader, damaged_bytes, damaged_content, damaged_text, damaged_tree
from pictures import encoded, picture, write_folder, write_parquet, write_tar
from safetensors.torch import save_file

from sendvae_fast.data.attributes import write_attributes
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.catalog_file import METADATA_KEY, read_origin
from sendvae_fast.data.decode import UnreadableImage
from sendvae_fast.data.indexing.listing_parts import ListingParts
from sendvae_fast.data.indexing.sandbox import SampleFacts
from sendvae_fast.data.latents.latent_cache import LatentCache, LatentCacheWriter
from sendvae_fast.data.latents.lightningdit import PublishedLatents
from sendvae_fast.data.latents.shard_format import SHARD_KEY, LatentSource
from sendvae_fast.data.scenes.scene_folder import synth_scenes

pytestmark = pytest.mark.slow

NUM = 4
SOURCE = LatentSource(
    autoencoder_sha256="a", autoencoder_config={"latent_channels": 2}, image_root="pictures", file_list_sha256="b",
    num_samples=NUM, image_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    files = {f"n{k % 2}/{k}.jpg": encoded(picture(8, 8, seed=k)) for k in range(NUM)}
    pictures = write_folder(folder / "pictures", files)
    write_attributes(pictures, ("round",), ((name, [k % 2]) for k, name in enumerate(files)))
    write_tar(folder / "tar/a.tar", {**files, **{name.replace("jpg", "cls"): b"1" for name in files}})
    write_parquet(folder / "parquet/a.parquet", [(name, data, k % 2) for k, (name, data) in enumerate(files.items())])
    catalog = Catalog.open(pictures)
    parts = ListingParts(folder / "parts", catalog.listing, NUM, {"indexed": "a"})
    parts.write(0, [SampleFacts(3, b"s" * 32, 8, 8, "RGB", "JPEG", "ok")] * NUM)
    Catalog(catalog.listing, catalog.attributes, parts.collect()).save(folder / "pictures.parquet")
    Catalog.open(folder / "tar").save(folder / "tars.parquet")
    synth_scenes(folder / "scenes", 2, size=8)
    writer = LatentCacheWriter(folder / "cache", SOURCE)
    writer.write_shard(0, torch.ones(NUM, 2, 1, 1), torch.ones(NUM, 2, 1, 1), torch.zeros(NUM, dtype=torch.long))
    writer.finish()
    (folder / "published").mkdir()
    latents = torch.ones(NUM, 2, 1, 1)
    shard = {"latents": latents, "latents_flip": latents.clone(), "labels": torch.zeros(NUM, dtype=torch.long)}
    save_file(shard, folder / "published/latents_rank00_shard000.safetensors")
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": latents[:1]}, folder / "published/latents_stats.pt")
    return folder


def damaged_note(path, draw):
    """Of parquet: half of the copies are sound files of unsound metadata, or of other numbers in a column."""
    if draw.random() < 0.5:
        return damaged_bytes(path.read_bytes(), draw)
    table = pq.read_table(path)
    column = draw.choice(["", "", "label", "file", "offset", "verdict"])
    if column:
        numbers = [draw.choice([None, -1, 0, 10**6, 2**40]) for _ in range(len(table))]
        table = table.set_column(table.column_names.index(column), column, pa.array(numbers, pa.int64()))
    else:
        note = damaged_tree(json.loads(table.schema.metadata[METADATA_KEY]), draw)
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(note)})
    file = pa.BufferOutputStream()
    pq.write_table(table, file)
    return file.getvalue().to_pybytes()


def damaged_header(path, draw):
    """Of a latent shard: half of the copies are sound safetensors with an unsound description."""
    content = path.read_bytes()
    if draw.random() < 0.5:
        return damaged_bytes(content, draw)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"][SHARD_KEY] = json.dumps(damaged_tree(json.loads(header["__metadata__"][SHARD_KEY]), draw))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read_pictures(where):
    catalog = Catalog.open(where)
    assert catalog.is_bad.dtype == bool and catalog.source.reading_order().shape == (len(catalog),)
    for k in range(min(len(catalog), NUM)):
        assert catalog.labels[k] < len(catalog.class_names) and catalog.locate(k)
        try:
            assert isinstance(catalog.read(k), bytes)
        except UnreadableImage:
            continue


def index_again(folder):
    """What `sendvae data index` does with what an interrupted call has left."""
    read_origin(folder / "pictures.parquet")
    parts = ListingParts(folder / "parts", Catalog.open(folder / "pictures").listing, NUM, {"indexed": "a"})
    assert len(parts.collect()) == NUM


def write_again(folder):
    """What `sendvae cache-latents` does with what an interrupted call has left."""
    description = folder / "cache/cache.json"
    before = description.read_bytes()
    description.unlink()
    try:
        writer = LatentCacheWriter(folder / "cache", SOURCE)
        if not writer.missing_shards():
            writer.finish()
    finally:
        description.write_bytes(before)


def read_published(folder):
    latents = PublishedLatents.open(folder / "published")
    assert latents.rows.load(torch.arange(len(latents)))[0].shape[1:] == (2, 1, 1)


def read_cache(folder):
    cache = LatentCache.open(folder / "cache", verify_hashes=True)
    cache.load(np.arange(len(cache)))


READERS = {
    "scenes": Reader("scenes/scenes.json", damaged_text, lambda folder: synth_scenes(folder / "scenes", 2, size=8)),
    "attributes": Reader("pictures/attributes.csv", damaged_content, lambda folder: read_pictures(folder / "pictures")),
    "tar": Reader("tar/a.tar", damaged_content, lambda folder: read_pictures(folder / "tar")),
    "parquet": Reader("parquet/a.parquet", damaged_content, lambda folder: read_pictures(folder / "parquet")),
    "catalog": Reader("pictures.parquet", damaged_note, lambda folder: read_pictures(folder / "pictures.parquet")),
    "catalog of tars": Reader("tars.parquet", damaged_note, lambda folder: read_pictures(folder / "tars.parquet")),
    "catalog, indexed again": Reader("pictures.parquet", damaged_content, index_again),
    "listing's origin": Reader("parts/origin.json", damaged_text, index_again),
    "listing's part": Reader("parts/part-00000.parquet", damaged_content, index_again),
    "latent cache": Reader("cache/latents_00000.safetensors", damaged_header, read_cache),
    "latent cache, unfinished": Reader("cache/latents_00000.safetensors", damaged_header, write_again),
    "published latents": Reader("published/latents_rank00_shard000.safetensors", damaged_content, read_published),
    "published statistics": Reader("published/latents_stats.pt", damaged_content, read_published),
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_user_error_or_nothing(name, folder):
    check_reader(name, READERS[name], folder)
