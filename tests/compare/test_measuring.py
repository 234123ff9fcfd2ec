"""What is measured of a trial, against the same taken by hand from its folder: whose pictures, beside which."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from tiny_comparison import comparison

from sendvae_fast.compare.compare import prepare_pictures
from sendvae_fast.compare.trial import REFERENCE, measure
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.evaluation.feature_networks import load_features
from sendvae_fast.evaluation.features import FoundationFeatures
from sendvae_fast.evaluation.latent_views import pictures_to_view
from sendvae_fast.evaluation.pictures import CatalogPictures, open_pictures
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.train.cache_latents import cache

pytestmark = pytest.mark.slow

NUM_TRAIN, NUM_TEST, NUM_SAMPLES = 48, 24, 6


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Two methods that take the demo's autoencoder, each with generated pictures of its own."""
    methods = [{"key": key, "weights": "demo"} for key in ("first", "second")]
    two = comparison(tmp_path_factory.mktemp("measured"), methods=methods)
    prepare_pictures(two.config.pictures, two.root)
    draw = np.random.default_rng(0)
    for one, brightest in zip(two.trials, (60, 256), strict=True):
        (one.folder / "generated").mkdir(parents=True)
        for number in range(NUM_SAMPLES):
            noise = draw.integers(0, brightest, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(one.folder / "generated" / f"{number}.png")
        cache(one.cache_config(), Distributed())
    return two.trials


@pytest.fixture(scope="module")
def trial(trials):
    return trials[1]


def images_of(pictures):
    return torch.cat(list(pictures.batches(100)))


def plain_frechet(network, one, other):
    """|m - n|² + tr(A + B - 2 √(AB)) of the pooled features of two sets of pictures; a product's roots are real."""
    features = [network(images).pooled.double().numpy() for images in (one, other)]
    (m, n), (a, b) = ([f(x) for x in features] for f in (lambda x: x.mean(0), lambda x: np.cov(x.T)))
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return ((m - n) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * roots


@torch.no_grad()
def test_numbers_are_of_its_own_pictures_beside_the_right_ones(trial):
    measure(trial, Distributed())
    found = {result.metric: result for result in read_results(trial.results)}
    train, test = (images_of(CatalogPictures(Catalog.open(folder), 32)) for folder in (trial.train, trial.test))
    assert {image.numpy().tobytes() for image in train}.isdisjoint(image.numpy().tobytes() for image in test)
    samples = images_of(open_pictures(trial.folder / "generated"))
    autoencoder = load_autoencoder(resolve_weights(trial.autoencoder)).autoencoder
    network = load_features(trial.config.features, torch.device("cpu"))
    mean, _ = autoencoder.encode(test / 127.5 - 1).chunk(2, dim=1)
    decoded = ((autoencoder.decode(mean).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for metric, one, other in (
        ("frechet_demo", samples, train), ("decoded_frechet_demo", samples, decoded), ("rfrechet_demo", test, decoded),
    ):  # fmt: skip
        assert found[metric].value == pytest.approx(plain_frechet(network, one, other), rel=1e-6), metric
    errors = (test.double() - decoded.double()).square().flatten(1).mean(1)
    assert found["psnr"].value == pytest.approx((10 * torch.log10(255**2 / errors)).mean().item(), rel=1e-5)
    counts = dict(found["attribute_f1"].counts)
    assert counts.pop("test") == NUM_TEST and sum(counts.values()) == NUM_TRAIN

    latents = LatentCache.open(trial.folder / "latents")
    cells = (mean - latents.latent_mean[:, None, None]) / latents.latent_std[:, None, None]
    tokens = load_foundation(trial.foundation)(test)  # of as many patches
    above = np.triu_indices(cells[0, 0].numel(), 1)
    ids, _ = pictures_to_view(CatalogPictures(Catalog.open(trial.test), 32), trial.config.views)
    agreement = [
        scipy.stats.spearmanr(cosines(cells[i].flatten(1).T)[above], cosines(tokens[i])[above]).statistic for i in ids
    ]
    assert found["patch_similarity_demo"].value == pytest.approx(np.mean(agreement), abs=5e-4)  # of half precision


def test_what_was_computed_of_a_picture_is_not_computed_again(trials, monkeypatch):
    """Per trial the held-out pictures and what becomes of them, and its samples; those to compare with for all."""
    num = {"decoded": 0, "looked at": 0}

    def count(owner, name, what):
        method = getattr(owner, name)

        def counting(self, images):
            num[what] += len(images)
            return method(self, images)

        monkeypatch.setattr(owner, name, counting)

    count(Autoencoder, "decode", "decoded")
    count(FoundationFeatures, "forward", "looked at")
    shutil.rmtree(Path(trials[0].config.run) / REFERENCE, ignore_errors=True)
    for trial in trials:
        measure(trial, Distributed())
    assert num == {"decoded": 2 * NUM_TEST, "looked at": 2 * (2 * NUM_TEST + NUM_SAMPLES) + NUM_TRAIN}


def cosines(vectors):
    vectors = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (vectors @ vectors.T).numpy()


def test_samples_are_no_way_from_themselves_as_the_reference(trial):
    config = dataclasses.replace(trial.config, reference=str(trial.folder / "generated"))
    others = trial.place / "first" / "generated"  # in place of scenes, whose attributes would be probed
    again = dataclasses.replace(trial, config=config, train=others)
    trial.results.unlink(missing_ok=True)
    measure(again, Distributed())
    found = {result.metric: result.value for result in read_results(trial.results)}
    assert found["frechet_demo"] == pytest.approx(0, abs=1e-6) and found["decoded_frechet_demo"] > 1
