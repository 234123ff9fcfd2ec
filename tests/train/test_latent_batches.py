"""What stage 2 is fed: latents beside their pictures, flipped alike, from our caches and from published ones."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import cache_of, sit_config, vae_config

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Posterior
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.train.settings import ImageDataConfig
from sendvae_fast.train.sit.latent_batches import TrainingLatents
from sendvae_fast.train.sit.settings import LatentReaderConfig
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

NUM_STEPS = 7


@pytest.fixture(scope="module")
def autoencoder(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "vae"
    train_vae(vae_config(run, images, alignment={"method": "none"}, loss={"gan_weight": 0.0}, loop={"num_steps": 1}))
    return run


@pytest.fixture(scope="module")
def latents(autoencoder, images, tmp_path_factory):
    return cache_of(autoencoder, images, tmp_path_factory.mktemp("latents") / "cache", flips=True)


def training_latents(latents, images=None, distributed=None, global_batch=8):
    data = ImageDataConfig(root=None if images is None else str(images), image_size=32, global_batch=global_batch)
    return TrainingLatents(
        str(latents),
        data,
        LatentReaderConfig(),
        with_images=images is not None,
        seed=3,
        accumulation_steps=1,
        distributed=distributed or init_distributed("cpu"),
    )


def first(batches):
    """The first batches; copied, because they hold only until the next one."""
    return [
        [value if value is None else value.clone() for value in batch] for batch in itertools.islice(batches, NUM_STEPS)
    ]


def test_latents_and_images_are_of_the_same_picture_flipped_alike(latents, images, autoencoder):
    """Every latent is the encoding of the very image beside it; about half of them are mirrored."""
    encoder = load_autoencoder(resolve_weights(autoencoder)).autoencoder
    originals = torch.cat([batch.images for batch in ImageLoader(Catalog.open(images), 32).in_order(8)])
    num_flipped = 0
    for ids, mean, std, labels, pictures in first(training_latents(latents, images).batches(0)):
        with torch.no_grad():
            posterior = Posterior.from_moments(encoder.encode(to_model_range(pictures)))
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(std, posterior.std, rtol=1e-4, atol=1e-4)
        assert torch.equal(labels, torch.from_numpy(Catalog.open(images).labels)[ids])
        plain, mirrored = originals[ids], originals[ids].flip(-1)
        is_plain, is_mirrored = ((pictures == x).flatten(1).all(1) for x in (plain, mirrored))
        assert (is_plain | is_mirrored).all()
        num_flipped += int((is_mirrored & ~is_plain).sum())
    assert 0.25 < num_flipped / (NUM_STEPS * 8) < 0.75


def test_flips_do_not_depend_on_ranks_and_images(latents, images):
    whole = first(training_latents(latents, images).batches(2))
    without_images = first(training_latents(latents).batches(2))
    ranks = [
        first(training_latents(latents, distributed=Distributed(rank, 2, rank, torch.device("cpu"))).batches(2))
        for rank in range(2)
    ]
    for step in range(NUM_STEPS):
        for value in range(4):
            assert torch.equal(whole[step][value], without_images[step][value])
            assert torch.equal(whole[step][value], torch.cat([rank[step][value] for rank in ranks]))
        assert without_images[step][4] is None


def publish(folder, num=20):
    """A folder as LightningDiT's extract_features writes it."""
    generator = torch.Generator().manual_seed(0)
    latents, flipped = torch.randn(2, num, 4, 8, 8, generator=generator)
    labels = torch.randint(7, (num,), generator=generator)
    labels[0] = 6
    folder.mkdir()
    for shard, part in enumerate((slice(0, 8), slice(8, num))):
        save_file(
            {"latents": latents[part], "latents_flip": flipped[part], "labels": labels[part]},
            folder / f"latents_rank{shard:02d}_shard000.safetensors",
        )
    statistics = {"mean": torch.full((1, 4, 1, 1), 0.5), "std": torch.full((1, 4, 1, 1), 2.0)}
    torch.save(statistics, folder / "latents_stats.pt")
    return latents, flipped, labels


def test_published_latents(tmp_path):
    latents, flipped, labels = publish(tmp_path / "published")
    data = training_latents(tmp_path / "published")
    assert data.num_classes == 7 and data.cache.latent_mean.tolist() == [0.5] * 4
    for ids, mean, std, its_labels, _ in first(data.batches(0)):
        is_plain = (mean == latents[ids]).flatten(1).all(1)
        assert (is_plain | (mean == flipped[ids]).flatten(1).all(1)).all()
        assert std.eq(0).all() and torch.equal(its_labels, labels[ids])


def test_stage_2_trains_on_published_latents_without_pictures(tmp_path):
    publish(tmp_path / "published")
    config = sit_config(
        tmp_path / "run",
        None,
        tmp_path / "published",
        repa={"weight": 0.0},
        data={"root": None},
        loop={"num_steps": 3},
    )
    assert train_sit(config) == 0
    saved = load_sit(tmp_path / "run" / "checkpoints" / "step_00000003")
    assert saved.sit.config.num_classes == 7 and saved.latent_std.tolist() == [2.0] * 4


def test_errors(tmp_path, latents, images):
    publish(tmp_path / "published")
    with pytest.raises(UserError, match="published latents .* set repa.weight=0"):
        training_latents(tmp_path / "published", images)
    with pytest.raises(UserError, match="global_batch=9 must be a multiple"):
        training_latents(latents, global_batch=9, distributed=Distributed(0, 2, 0, torch.device("cpu")))
    with pytest.raises(UserError, match="data.root is missing"):
        TrainingLatents(
            str(latents),
            ImageDataConfig(image_size=32, global_batch=8),
            LatentReaderConfig(),
            with_images=True,
            seed=0,
            accumulation_steps=1,
            distributed=init_distributed("cpu"),
        )
    statistics = tmp_path / "published" / "latents_stats.pt"
    for content, message in (
        ({"mean": torch.zeros(4)}, "does not hold mean and std"),
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, "std of 0"),
    ):
        torch.save(content, statistics)
        with pytest.raises(UserError, match=message):
            training_latents(tmp_path / "published")
    statistics.unlink()
    with pytest.raises(UserError, match="latents_stats.pt is missing"):
        training_latents(tmp_path / "published")
