"""Protocols of reconstruction against their plain transcriptions, with a tiny autoencoder."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchvision import transforms

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.crop import read_crop
from sendvae_fast.evaluation import chunks
from sendvae_fast.evaluation.features import FoundationFeatures
from sendvae_fast.evaluation.frechet import frechet_distance
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.reconstruction import ReconstructionJob
from sendvae_fast.evaluation.reconstruction_protocols import PROTOCOLS
from sendvae_fast.evaluation.reconstruction_quality import ssim
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder, Posterior
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.ops import philox

pytestmark = pytest.mark.usefixtures("one_thread")
NUM, SIZE = 6, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Smooth pictures of several shapes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 70), (70, 40), (90, 64), (32, 32), (20, 30), (100, 33)]):
        pixels = gaussian_filter(rng.normal(size=(height, width, 3)), (3, 3, 0)) * 900 + 128
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{number:06d}.png")
    return root


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    sizes = dict(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4)
    return (
        Autoencoder(AutoencoderConfig(nominal_resolution=SIZE, latent_channels=4, **sizes)).eval().requires_grad_(False)
    )


@pytest.fixture(scope="module")
def network():
    return FoundationFeatures("demo", None)


class Difference:
    """In LPIPS' place: the mean absolute difference, of the decoder's floats as they are."""

    net = "difference"

    def __call__(self, x, y):
        return (x - y).abs().mean(dim=(1, 2, 3))


def measure(photos, autoencoder, network, protocol, batch_size=4, pictures=None, **options):
    job = ReconstructionJob(
        autoencoder=autoencoder,
        protocol=PROTOCOLS[protocol],
        network=network,
        perceptual=Difference(),
        batch_size=batch_size,
        pictures=pictures,
    )
    return {item.metric: item for item in job.measure(CatalogPictures(Catalog.open(photos), SIZE), **options)}


def decibels(originals, decoded):
    """Of pictures as a PNG file would hold them."""
    sides = [(127.5 * x + 128).clamp(0, 255).to(torch.uint8).double() for x in (originals, decoded)]
    return 20 * torch.log10(255 / (sides[0] - sides[1]).square().mean(dim=(1, 2, 3)).sqrt()), sides


def test_lightningdits_protocol(folder, autoencoder, network):
    """Its transforms, its sample of the posterior (with our noise), its metrics, on all pictures as one batch."""
    steps = [transforms.ToTensor(), transforms.Resize(SIZE), transforms.CenterCrop(SIZE)]
    transform = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)])
    files = sorted(folder.glob("*.png"))
    originals = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    found = measure(folder, autoencoder, network, "lightningdit")
    posterior = Posterior.from_moments(autoencoder.encode(originals))
    noise = torch.stack([posterior_noise(index, posterior.mean.shape[1:]) for index in range(NUM)])
    decoded = autoencoder.decode(posterior.mean + posterior.std * noise)
    expected_db, sides = decibels(originals, decoded)
    assert found["psnr"].value == pytest.approx(float(expected_db.mean()), abs=1e-3)
    similarity = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))(decoded, originals)
    assert found["ssim"].value == pytest.approx(float(similarity), abs=1e-5)
    assert found["lpips_difference"].value == pytest.approx(float((decoded - originals).abs().mean()), rel=1e-4)
    features = [network(side.to(torch.uint8)).pooled.double() for side in sides]
    moments = [part for side in features for part in (side.mean(dim=0), side.T.cov())]
    assert found["rfrechet_demo"].value == pytest.approx(frechet_distance(*moments), rel=1e-3)
    assert found["ssim"].protocol == "lightningdit" and "no more than" in found["rfrechet_demo"].remarks[-1]
    deviation = float(expected_db.std()) / NUM**0.5
    assert found["psnr"].interval[1] - found["psnr"].value == pytest.approx(1.96 * deviation, rel=1e-2)


def posterior_noise(index, shape):
    """A picture's noise from the definition of the package's random numbers, by itself."""
    key, ids = philox.make_key(0, 0), torch.tensor([index])
    return philox.normal(key, philox.Stream.POSTERIOR, ids, tuple(shape))[0]


def test_adms_protocol(folder, autoencoder, network):
    """ADM's crop in uint8, the posterior's mean, Wang's SSIM on uint8."""
    crops = [torch.from_numpy(read_crop(str(file), SIZE)) for file in sorted(folder.glob("*.png"))]
    originals = torch.stack(crops).float() / 127.5 - 1
    decoded = autoencoder.decode(Posterior.from_moments(autoencoder.encode(originals)).mean)
    expected_db, sides = decibels(originals, decoded)
    found = measure(folder, autoencoder, network, "adm")
    assert found["psnr"].value == pytest.approx(float(expected_db.mean()), abs=1e-3)
    assert found["ssim"].value == pytest.approx(float(ssim(*(side.to(torch.uint8) for side in sides)).mean()), abs=1e-5)
    other = measure(folder, autoencoder, network, "lightningdit")
    assert abs(found["ssim"].value - other["ssim"].value) > 1e-3  # what the protocol is noted for


@torch.no_grad()
@pytest.mark.parametrize("further", [None, "judge"])
def test_the_reconstructions_features_are_those_of_the_network_that_is_asked_for(
    folder, autoencoder, network, further, tmp_path
):
    asked = network if further is None else FoundationFeatures(further, None)
    job = ReconstructionJob(
        autoencoder=autoencoder, protocol=PROTOCOLS["adm"], network=network, further=None if further is None else asked
    )
    pictures = CatalogPictures(Catalog.open(folder), SIZE)
    found = job.features_of_reconstructions(job.compute(pictures, folder=tmp_path))
    images = torch.cat(list(pictures.batches(NUM)))
    decoded = autoencoder.decode(Posterior.from_moments(autoencoder.encode(images / 127.5 - 1)).mean)
    expected = asked(to_uint8(decoded, "round")).pooled
    torch.testing.assert_close(found.pooled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.statistics.mean, expected.double().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_batches_files_and_restarts_change_nothing(folder, autoencoder, network, protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 4)
    expected = measure(folder, autoencoder, network, protocol, batch_size=NUM)
    for _ in range(2):
        found = measure(folder, autoencoder, network, protocol, batch_size=1, folder=tmp_path)
        for name, item in expected.items():
            assert found[name].value == pytest.approx(item.value, rel=1e-4), name
        (tmp_path / "part_00001.safetensors").unlink()


def test_the_pictures_are_written_as_they_were_compared(folder, autoencoder, network, tmp_path):
    found = measure(folder, autoencoder, network, "adm", pictures=tmp_path)
    pairs = [
        [
            np.asarray(Image.open(tmp_path / name / f"{index:06d}.png"), float)
            for name in ("originals", "reconstructions")
        ]
        for index in range(NUM)
    ]
    values = [20 * np.log10(255 / np.sqrt(np.square(a - b).mean())) for a, b in pairs]
    assert found["psnr"].value == pytest.approx(np.mean(values))


def test_identical_pictures_count_as_a_hundred_decibels(folder, autoencoder, network, monkeypatch):
    monkeypatch.setattr("sendvae_fast.evaluation.reconstruction.reconstruct", lambda network, x, *_: x)
    found = measure(folder, autoencoder, network, "adm")
    assert found["psnr"].value == 100 and "6 identical pictures" in found["psnr"].remarks[0]
    assert found["ssim"].value == pytest.approx(1) and found["rfrechet_demo"].value == pytest.approx(0, abs=1e-6)
