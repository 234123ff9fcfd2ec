"""Where pictures come from, how many at once, and who works on them change no feature."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation import chunks
from sendvae_fast.evaluation.distribution_metrics import Reference, distribution_metrics
from sendvae_fast.evaluation.extraction import extract
from sendvae_fast.evaluation.features import FeatureNetwork, Features
from sendvae_fast.evaluation.generation import open_reference
from sendvae_fast.evaluation.pictures import open_pictures
from sendvae_fast.evaluation.result import FeaturesOrigin

NUM = 11


class Corners(FeatureNetwork):
    """A picture's first pixels as they are: no rounding, so that features can be compared exactly."""

    def __init__(self):
        super().__init__(
            FeaturesOrigin(name="corners", dim=3, weights="none", sha256="0" * 64), protocol="first pixels"
        )
        self.scale, self.calls = torch.nn.Parameter(torch.ones(())), 0

    def forward(self, images):
        self.calls += 1
        pixels = images.flatten(2).float() * self.scale
        return Features(pixels[:, :, 0], pixels[:, 0, :4], pixels[:, 1, :5])


@dataclass(frozen=True)
class Rank(Distributed):
    """One of several ranks that run after another: nobody waits, and each hears of three missing files."""

    def broadcast_object(self, value, source=0):
        return [0, 1, 2]

    def gather_objects(self, value):
        return [value]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same random pictures as PNG files and as an npz."""
    root = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM, 8, 8, 3), dtype=np.uint8)
    (root / "png").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(root / "png" / f"{number:06d}.png")
    np.savez(root / "plain.npz", arr_0=pixels)
    np.savez_compressed(root / "small.npz", arr_0=pixels)
    return root, torch.from_numpy(pixels[:, 0, 0].astype(np.float32))


@pytest.mark.parametrize("source", ["png", "plain.npz", "small.npz"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sources_and_batches_change_nothing(folder, source, batch_size, tmp_path):
    root, expected = folder
    pictures = open_pictures(root / source)
    held = extract(pictures, Corners(), batch_size)
    kept = extract(pictures, Corners(), batch_size, folder=tmp_path)
    assert torch.equal(held.pooled, expected) and torch.equal(kept.pooled, expected)
    assert torch.equal(held.logits, kept.logits) and kept.logits.shape == (NUM, 5)
    np.testing.assert_allclose(kept.statistics.covariance, np.cov(expected.numpy(), rowvar=False), rtol=1e-12)
    assert kept.spatial_statistics.num == NUM and kept.spatial_statistics.mean.shape == (4,)


def test_ranks_share_the_work_and_a_lost_file_is_made_again(folder, tmp_path):
    root, expected = folder
    pictures, networks = open_pictures(root / "plain.npz"), [Corners(), Corners()]
    for rank in (1, 0):
        found = extract(pictures, networks[rank], 4, Rank(rank=rank, world_size=2), tmp_path)
    assert torch.equal(found.pooled, expected) and [network.calls for network in networks] == [2, 1]
    next(tmp_path.rglob("part_00001.safetensors")).unlink()
    again = Corners()
    assert torch.equal(extract(pictures, again, 4, folder=tmp_path).pooled, expected) and again.calls == 1
    next(tmp_path.rglob("part_00002.safetensors")).write_bytes(b"cut off")
    with pytest.raises(UserError, match="part_00002.safetensors is damaged"):
        _ = extract(pictures, again, 4, folder=tmp_path).pooled


def test_what_fails_on_one_rank_fails_on_all(folder, tmp_path):
    """No rank is left waiting for one that has given up."""

    class Other(Rank):
        def gather_objects(self, value):
            return ["the disk of rank 0 is full", value]

    with pytest.raises(UserError, match="the disk of rank 0 is full"):
        extract(open_pictures(folder[0] / "plain.npz"), Corners(), 4, Other(rank=1, world_size=2), tmp_path)


def test_folders_of_the_same_names_are_told_apart(folder, tmp_path):
    """And so is a folder from what it held before."""
    root, expected = folder
    (tmp_path / "png").mkdir()
    for number in range(NUM):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "png" / f"{number:06d}.png")
    for _ in range(2):
        for source, first in ((root / "png", expected[0, 0]), (tmp_path / "png", 0.0)):
            found = extract(open_pictures(source), Corners(), 4, folder=tmp_path / "features")
            assert found.pooled[0, 0] == first
    Image.new("RGB", (8, 8), (99, 0, 0)).save(tmp_path / "png" / "000000.png")
    assert extract(open_pictures(tmp_path / "png"), Corners(), 4, folder=tmp_path / "features").pooled[0, 0] == 99


def test_features_that_are_not_finite_name_their_pictures(folder):
    network = Corners()
    network.scale.data.fill_(torch.nan)
    with pytest.raises(UserError, match="features of pictures 0 to 3 .* are not finite: the weights none"):
        extract(open_pictures(folder[0] / "png"), network, 64)


def test_metrics_carry_the_networks_name_and_what_to_know_of_them(folder):
    features = extract(open_pictures(folder[0] / "png"), Corners(), 64)
    measured = distribution_metrics(features, Reference(features), Corners(), torch.device("cpu"))
    found = {item.metric.removesuffix("_corners"): item for item in measured}
    names = {"frechet", "spatial_frechet", "inception_score", "precision", "recall", "kid", "mind"}
    assert set(found) == names and all(item.metric.endswith("_corners") for item in measured)
    assert found["precision"].value == found["recall"].value == 1
    assert found["frechet"].value == pytest.approx(0, abs=1e-6) and found["frechet"].interval is not None
    assert found["frechet"].counts == {"samples": NUM, "reference": NUM}
    low, high = found["precision"].interval  # Wilson's of 11 in 11
    assert (low, high) == pytest.approx((1 / (1 + 1.959964**2 / 11), 1), abs=1e-6)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3))}, r"float64 \[2, 8, 8, 3\]; give pictures as uint8"),
        ({"arr_0": np.zeros((2, 8, 4, 3), np.uint8)}, r"\[2, 8, 4, 3\]"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "no pictures in it"),
        ({"arr_0": np.zeros((2, 16, 16, 3), np.uint8)}, "pictures of 16 pixels, not 8"),
        ({"pictures": np.zeros((2, 8, 8, 3), np.uint8)}, "no arr_0"),
    ],
)
def test_an_npz_that_is_no_picture_file_is_named(tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=said):
        open_pictures(tmp_path / "x.npz", 8)


def test_a_reference_has_pictures_or_inceptions_moments(folder, tmp_path):
    root, _ = folder
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.ones(2023), "sigma_s": np.eye(2023)}
    with np.load(root / "plain.npz") as archive:
        np.savez(tmp_path / "adm.npz", arr_0=archive["arr_0"], **moments)
    np.savez(tmp_path / "moments.npz", mu=moments["mu"], sigma=moments["sigma"])
    pictures, (pooled, spatial) = open_reference(str(tmp_path / "adm.npz"), 8, "inception")
    assert len(pictures) == NUM and pooled.mean.shape == (2048,) and (spatial.mean == 1).all()
    assert open_reference(str(tmp_path / "adm.npz"), 8, "demo")[1] is None
    assert open_reference(str(tmp_path / "moments.npz"), 8, "inception")[0] is None
    with pytest.raises(UserError, match="has mu, sigma: give an npz with pictures"):
        open_reference(str(tmp_path / "moments.npz"), 8, "demo")
    with pytest.raises(UserError, match="adm.npz has pictures of 8 pixels, not 16: compare pictures of one size"):
        open_reference(str(tmp_path / "adm.npz"), 16, "inception")
    np.savez(tmp_path / "other.npz", mu=np.zeros(768), sigma=np.eye(768))
    with pytest.raises(UserError, match="mu has 768 features, Inception 2048: give a reference of its features"):
        open_reference(str(tmp_path / "other.npz"), 8, "inception")


def test_pictures_of_several_sizes_are_refused(folder, tmp_path):
    for number, size in enumerate((8, 9)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{number:06d}.png")
    with pytest.raises(UserError, match="not square and of one size"):
        open_pictures(tmp_path)
