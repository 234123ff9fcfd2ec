import json

import numpy as np
import pytest
import torch
from PIL import Image

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache, LatentCacheWriter, LatentSource
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.errors import UserError
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.train.cache_latents import cache_latents

NUM, SHAPE = 23, (3, 4, 5)
CONFIG = {"latent_channels": 3, "channel_multipliers": (1, 2)}


def make_source(**changes):
    values = {
        "autoencoder_sha256": "a" * 64,
        "autoencoder_config": CONFIG,
        "image_root": "/images",
        "file_list_sha256": "b" * 64,
        "num_samples": NUM,
        "image_size": 32,
        "shard_size": 6,
    }
    return LatentSource(**{**values, **changes})


def latents(num=NUM):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 2.0, 1.0])[:, None, None]
    mean = scale * torch.randn(num, *SHAPE, generator=generator) + torch.tensor([3.0, -1.0, 0.0])[:, None, None]
    std = 0.1 + scale * torch.rand(num, *SHAPE, generator=generator)
    return mean, std, torch.randint(0, 9, (num,), generator=generator)


def write(directory, source, shards=None):
    writer = LatentCacheWriter(directory, source)
    mean, std, labels = latents()
    for shard in writer.missing_shards() if shards is None else shards:
        part = slice(*source.shard_range(shard))
        writer.write_shard(shard, mean[part], std[part], labels[part])
    return writer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_at_random(tmp_path, dtype):
    write(tmp_path, make_source(dtype=dtype)).finish()
    cache = LatentCache.open(tmp_path, verify_hashes=True)
    mean, std, labels = latents()
    assert len(cache) == NUM and cache.latent_shape == SHAPE and torch.equal(cache.labels, labels)
    stored = getattr(torch, dtype)
    for ids in ([22, 0, 7, 7, 6, 5, 11], list(range(NUM)), [3], []):
        got_mean, got_std, got_labels = cache.load(np.array(ids, np.int64))
        assert got_mean.dtype == got_std.dtype == stored and got_labels.dtype == torch.int64
        assert torch.equal(got_mean, mean[ids].to(stored)) and torch.equal(got_std, std[ids].to(stored))
        assert torch.equal(got_labels, labels[ids])
    assert torch.equal(cache.load(torch.tensor([4]))[0], mean[[4]].to(stored))


def test_statistics_are_those_of_sampled_latents(tmp_path):
    cache = write(tmp_path, make_source()).finish()
    mean, std, _ = (value.double() for value in latents())
    torch.testing.assert_close(cache.latent_mean, mean.mean((0, 2, 3)).float())
    variance = mean.var((0, 2, 3), correction=0) + (std**2).mean((0, 2, 3))
    torch.testing.assert_close(cache.latent_std, variance.sqrt().float())
    noise = torch.randn(2000, *mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    samples = mean + std * noise
    torch.testing.assert_close(samples.std((0, 1, 3, 4)).float(), cache.latent_std, rtol=2e-3, atol=0)


def test_resume_keeps_whole_shards_and_equals_one_go(tmp_path):
    write(tmp_path / "once", make_source()).finish()
    write(tmp_path / "twice", make_source(), shards=[0, 2])
    kept = (tmp_path / "twice" / "latents_00002.safetensors").stat().st_mtime_ns
    broken = tmp_path / "twice" / "latents_00000.safetensors"
    broken.write_bytes(broken.read_bytes()[:-9])
    writer = LatentCacheWriter(tmp_path / "twice", make_source())
    assert writer.missing_shards() == [0, 1, 3] and not writer.is_complete
    with pytest.raises(UserError, match="lacks 3 of 4 shards"):
        writer.finish()
    with pytest.raises(UserError, match="not a finished latent cache"):
        LatentCache.open(tmp_path / "twice")
    write(tmp_path / "twice", make_source()).finish()
    assert (tmp_path / "twice" / "latents_00002.safetensors").stat().st_mtime_ns == kept
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "twice").iterdir())
    assert all((tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    "change",
    [
        {"autoencoder_sha256": "c" * 64},
        {"autoencoder_config": {"latent_channels": 4}},
        {"file_list_sha256": "d" * 64},
        {"image_size": 64},
        {"dtype": "bfloat16"},
        {"shard_size": 7},
        {"num_samples": 24},
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_sources_are_not_mixed(tmp_path, change, finished):
    writer = write(tmp_path, make_source())
    if finished:
        writer.finish()
    with pytest.raises(UserError, match=f"made with {next(iter(change))} .*another cache directory"):
        LatentCacheWriter(tmp_path, make_source(**change))
    assert LatentCacheWriter(tmp_path, make_source(image_root="/moved")).missing_shards() == []


def test_open_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        LatentCache.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cache.json is missing"):
        LatentCache.open(tmp_path / "empty")
    write(tmp_path, make_source()).finish()
    shard, note = tmp_path / "latents_00001.safetensors", tmp_path / "cache.json"
    content, text = shard.read_bytes(), note.read_text()

    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match="latents_00001.safetensors has .* bytes instead of"):
        LatentCache.open(tmp_path)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    LatentCache.open(tmp_path)
    with pytest.raises(UserError, match="latents_00001.safetensors has changed"):
        LatentCache.open(tmp_path, verify_hashes=True)
    shard.write_bytes(b"\xff" * len(content))
    with pytest.raises(UserError, match="latents_00001.safetensors cannot be read"):
        LatentCache.open(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="latents_00001.safetensors is missing"):
        LatentCache.open(tmp_path)
    note.write_text(text[:50])
    with pytest.raises(UserError, match="cache.json is damaged"):
        LatentCache.open(tmp_path)
    note.write_text(json.dumps({**json.loads(text), "schema_version": 2}))
    with pytest.raises(UserError, match="schema version 2"):
        LatentCache.open(tmp_path)


def test_misuse(tmp_path):
    writer = LatentCacheWriter(tmp_path, make_source())
    mean, std, labels = latents(6)
    mean[2, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="sample 8 is not finite"):
        writer.write_shard(1, mean, std, labels)
    with pytest.raises(ValueError, match="takes 5 samples"):
        writer.write_shard(3, std, std, labels)
    cache = write(tmp_path, make_source()).finish()
    for ids in ([NUM], [-1]):
        with pytest.raises(IndexError):
            cache.load(np.array(ids))
    with pytest.raises(UserError, match="float16"):
        make_source(dtype="float16")


@pytest.fixture
def loader(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(NUM):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return ImageLoader(Catalog.open(tmp_path / "images"), 16)


def encode(images):
    mean = images.float().unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))
    return mean, 0.5 + mean / 255


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_cache_latents_holds_what_encode_says(tmp_path, loader, world_size):
    source = LatentSource.of_catalog(loader.catalog, 16, "a" * 64, CONFIG, shard_size=5)
    for rank in range(world_size):
        cache_latents(
            encode,
            loader,
            LatentCacheWriter(tmp_path / "cache", source),
            batch_size=3,
            rank=rank,
            world_size=world_size,
        )
    cache = LatentCacheWriter(tmp_path / "cache", source).finish()
    images = torch.cat([batch.images for batch in loader.in_order(8)])
    mean, std, labels = cache.load(torch.arange(NUM))
    assert torch.equal(mean, encode(images)[0]) and torch.equal(std, encode(images)[1])
    assert torch.equal(labels, torch.from_numpy(loader.catalog.labels))


def test_an_interrupted_job_goes_on(tmp_path, loader):
    source = LatentSource.of_catalog(loader.catalog, 16, "a" * 64, CONFIG, shard_size=5)
    calls = []

    def dying(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        cache_latents(dying, loader, LatentCacheWriter(tmp_path / "cache", source), batch_size=3)
    writer = LatentCacheWriter(tmp_path / "cache", source)
    assert writer.missing_shards() == [1, 2, 3, 4]
    cache_latents(encode, loader, writer, batch_size=3)
    assert len(writer.finish()) == NUM


def test_a_cache_knows_its_images(tmp_path, loader):
    source = LatentSource.of_catalog(loader.catalog, 16, "a" * 64, CONFIG)
    writer = LatentCacheWriter(tmp_path / "cache", source)
    cache_latents(encode, loader, writer)
    cache = writer.finish()
    cache.check_catalog(loader.catalog, 16)
    with pytest.raises(UserError, match="not from these 23 images of 32 px"):
        cache.check_catalog(loader.catalog, 32)
    (tmp_path / "images" / "class0" / "00.png").rename(tmp_path / "images" / "class0" / "99.png")
    with pytest.raises(UserError, match="give the same images, or run `sendvae cache-latents`"):
        cache.check_catalog(Catalog.open(tmp_path / "images"), 16)


def test_weights_hash():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    truth = weights_sha256(state)
    assert weights_sha256(dict(reversed(state.items()))) == truth
    assert weights_sha256({**state, "a": state["a"].t().contiguous().t()}) == truth  # layout is no content
    for other in (
        {**state, "a": state["a"] + 1},
        {**state, "a": state["a"].reshape(3, 2)},
        {"a": state["a"]},
        {**state, "a": state["a"].half()},
    ):
        assert weights_sha256(other) != truth
