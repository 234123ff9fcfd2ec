"""`load_autoencoder` and `load_generator` on run folders, checkpoints and published files, and what they give."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import sendvae_fast
from sendvae_fast.data.scenes.scene_folder import render_scenes
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.reconstruction_quality import psnr
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.pretrained import PretrainedAutoencoder, PretrainedGenerator
from sendvae_fast.sampling.settings import SamplerConfig

RUNS = Path(__file__).parent / "old_runs"
STEPS = SamplerConfig(num_steps=3)


@pytest.fixture(scope="module")
def autoencoder() -> PretrainedAutoencoder:
    return sendvae_fast.load_autoencoder(RUNS / "vae")


@pytest.fixture(scope="module")
def generator() -> PretrainedGenerator:
    generator = sendvae_fast.load_generator(RUNS / "sit")
    torch.manual_seed(0)
    for parameter in generator.parameters():  # three steps from its start, the run's gives all classes velocity 0
        torch.nn.init.normal_(parameter, std=0.1)
    return generator


def test_the_packaged_autoencoder_knows_scenes(tmp_path, monkeypatch):
    """A demo's held-out scenes came back at 22.9 dB. A path of the same name goes first."""
    scenes, *_ = render_scenes(range(40), 32, seed=3, num_workers=1)
    packaged = sendvae_fast.load_autoencoder("demo")
    images = torch.from_numpy(scenes)
    with torch.no_grad():
        decoded = packaged.decode(packaged.encode(images))
    assert psnr(images, to_uint8(decoded, "round")).mean() > 22
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(UserError, match="demo is neither"):
        sendvae_fast.load_autoencoder("demo")


def pictures(autoencoder: PretrainedAutoencoder) -> torch.Tensor:
    size = 4 * autoencoder.downsampling
    return torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_latents_are_normalised_and_come_back(autoencoder):
    images = pictures(autoencoder)
    x = images.double() / 127.5 - 1
    latents = autoencoder.encode(images)
    mean, _ = autoencoder.network.encode(x.float()).chunk(2, dim=1)
    offset, scale = (part.view(1, -1, 1, 1) for part in (autoencoder.latent_mean, autoencoder.latent_std))
    assert (scale != 1).all() and (offset != 0).all()
    assert_close(latents, (mean - offset) / scale)
    assert_close(autoencoder.encode(x.float()), latents)
    assert_close(autoencoder.decode(latents), autoencoder.network(x.float()))
    assert not autoencoder.training


def test_it_moves_as_a_whole_and_takes_gradients(autoencoder):
    images = pictures(autoencoder)
    half = sendvae_fast.load_autoencoder(RUNS / "vae").to(torch.bfloat16)
    with torch.no_grad():
        assert_close(half.encode(images).float(), autoencoder.encode(images), rtol=0.1, atol=0.1)
        assert half.decode(half.encode(images)).dtype == torch.bfloat16
    x = (images / 127.5 - 1).requires_grad_()
    autoencoder.encode(x).square().mean().backward()
    assert x.grad.abs().sum() > 0


def test_a_checkpoint_is_its_run(autoencoder):
    [checkpoint] = (RUNS / "vae" / "checkpoints").iterdir()
    images = pictures(autoencoder)
    with torch.no_grad():
        assert torch.equal(sendvae_fast.load_autoencoder(checkpoint).encode(images), autoencoder.encode(images))


def test_a_published_file_takes_a_factor(tmp_path):
    torch.manual_seed(0)
    network = Autoencoder(AutoencoderConfig(base_channels=32, channel_multipliers=(1, 2), attention_resolutions=()))
    save_file(network.state_dict(), tmp_path / "published.safetensors")
    with pytest.raises(UserError, match="no latent statistics"):
        sendvae_fast.load_autoencoder(tmp_path / "published.safetensors")
    loaded = sendvae_fast.load_autoencoder(tmp_path / "published.safetensors", scaling_factor=0.5)
    images = pictures(loaded)
    with torch.no_grad():
        assert_close(loaded.encode(images), 0.5 * network.encode(images / 127.5 - 1).chunk(2, dim=1)[0])


def test_samples(generator, autoencoder):
    few = generator.sample(autoencoder, 3, sampler=STEPS, guidance_scale=1.5)
    size = generator.network.config.latent_size * autoencoder.downsampling
    assert few.images.shape == (3, 3, size, size) and few.images.dtype == torch.uint8
    assert few.ids.tolist() == [0, 1, 2]
    again = generator.sample(autoencoder, 4, sampler=STEPS, guidance_scale=1.5, batch_size=3)
    assert torch.equal(again.labels[:3], few.labels)
    assert (again.images[:3].int() - few.images.int()).abs().max() <= 1  # where rounding tips a grey level over
    given = generator.sample(autoencoder, 3, few.labels.tolist(), sampler=STEPS, guidance_scale=1.5)
    assert torch.equal(given.images, few.images) and torch.equal(given.labels, few.labels)
    other = generator.sample(autoencoder, 3, sampler=STEPS, guidance_scale=1.5, seed=1)
    assert not torch.equal(other.images, few.images)


def test_the_class_decides_the_picture(generator, autoencoder):
    draws = [generator.sample(autoencoder, 2, label, sampler=STEPS) for label in (0, 1)]
    assert [draw.labels.tolist() for draw in draws] == [[0, 0], [1, 1]]
    assert not torch.equal(draws[0].images, draws[1].images)


def test_what_does_not_fit_is_one_clear_line(generator, autoencoder, tmp_path):
    classes = generator.network.config.num_classes
    with pytest.raises(UserError, match=f"classes are 0 to {classes - 1}"):
        generator.sample(autoencoder, 2, classes)
    with pytest.raises(UserError, match="3 classes for 2 pictures"):
        generator.sample(autoencoder, 2, [0, 0, 0])
    with pytest.raises(UserError, match="num_samples is 0"):
        generator.sample(autoencoder, 0)
    with pytest.raises(TypeError, match="guidance"):
        generator.sample(autoencoder, guidance=2.0)
    with pytest.raises(UserError, match="on meta, the generator on cpu"):
        generator.sample(sendvae_fast.load_autoencoder(RUNS / "vae").to("meta"), 2)
    with pytest.raises(UserError, match="does not exist"):
        sendvae_fast.load_generator(tmp_path / "nothing")
    with pytest.raises(UserError):
        sendvae_fast.load_generator(RUNS / "vae")
    with pytest.raises(UserError, match="neither a weight folder"):
        sendvae_fast.load_autoencoder(tmp_path)
