"""MAETok through the verbs: its latents cached, its reconstructions measured."""

import json

import pytest
import torch
from models.maetok_weights import SMALL, filled, published_shapes
from safetensors.torch import save_file
from tiny_runs import NUM_IMAGES, cache_of
from torch.testing import assert_close

from sendvae_fast.cli.main import main
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.data.loader import ImageLoader, LoaderConfig
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_model_range

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def maetok(tmp_path_factory):
    """A folder as its authors publish it."""
    folder = tmp_path_factory.mktemp("maetok")
    state = {name: value.float() for name, value in filled(published_shapes(**SMALL)).items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"codebook_embed_dim": 3, "vq_mean": 0.1, "vq_std": 0.5}))
    return folder


@pytest.fixture(scope="module")
def latents(maetok, images, tmp_path_factory):
    return cache_of(maetok, images, tmp_path_factory.mktemp("latents") / "cache")


@torch.no_grad()
def test_its_latents_are_cached_as_they_are(maetok, images, latents):
    cache = LatentCache.open(latents)
    mean, std, _ = cache.load(torch.arange(NUM_IMAGES))
    (batch,) = ImageLoader(Catalog.open(images), 32, LoaderConfig(cache_mb=0, num_threads=1)).in_order(NUM_IMAGES)
    encoded = load_autoencoder(maetok).autoencoder.posterior(to_model_range(batch.images)).mean
    assert cache.latent_shape == (3, 1, 5) and not std.any()
    assert_close(mean, encoded, rtol=0, atol=1e-5)
    assert_close(cache.latent_mean, encoded.mean((0, 2, 3)), rtol=0, atol=1e-5)
    assert_close(cache.latent_std, encoded.std((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_another_picture_size_is_refused_before_the_work(maetok, images, tmp_path, capsys):
    for verb in (["cache-latents", f"--out={tmp_path / 'x'}"], ["evaluate", "reconstruction", "--features.name=demo"]):
        code = main([*verb, f"--autoencoder={maetok}", f"--data={images}", "--image_size=64"])
        message = capsys.readouterr().err.strip()
        assert code == 2 and "takes pictures of 32 x 32 pixels and no other" in message and "\n" not in message
    assert not (tmp_path / "x").exists()


def test_its_reconstructions_are_measured(maetok, images, capsys):
    assert main(["evaluate", "reconstruction", f"--autoencoder={maetok}", f"--data={images}", "--image_size=32",
                 "--protocol=adm", "--features.name=demo"]) == 0  # fmt: skip
    measured = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    (batch,) = ImageLoader(Catalog.open(images), 32, LoaderConfig(cache_mb=0, num_threads=1)).in_order(NUM_IMAGES)
    with torch.no_grad():
        decoded = load_autoencoder(maetok).autoencoder(to_model_range(batch.images))
    errors = ((decoded.clamp(-1, 1) + 1) * 127.5).round() - batch.images
    expected = (20 * torch.log10(255 / errors.square().mean((1, 2, 3)).sqrt())).mean()
    assert float(measured["psnr"]) == pytest.approx(float(expected), abs=2e-3)
