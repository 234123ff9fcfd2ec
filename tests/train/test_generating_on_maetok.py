"""MAETok through the verbs: its latents cached, its reconstructions measured, a generator trained and sampled from."""

import json

import numpy as np
import pytest
import torch
from models.maetok_weights import SMALL, filled, published_shapes
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import NUM_IMAGES, cache_of, sit_config, vae_config
from torch.testing import assert_close

from sendvae_fast import load_autoencoder as load_pretrained
from sendvae_fast import load_generator
from sendvae_fast.cli.main import main
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.storage import load_autoencoder, save_autoencoder
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.sampling.settings import SamplerConfig
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

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


GENERATOR = {"repa": {"weight": 0.0}, "flow": {"noise_level": "logit_normal"}}
LIGHTNING = {"swiglu": True, "rms_norm": True, "rope": True}


@pytest.mark.parametrize("switches", [{}, LIGHTNING, {"diffusion": True}], ids=["SiT", "LightningDiT", "DiT"])
def test_a_generator_learns_its_latents_and_draws_pictures(switches, maetok, latents, images, tmp_path):
    run, is_dit = tmp_path / "run", "diffusion" in switches
    settings = GENERATOR | {"generator": switches, "optimizer": {"learning_rate": 1e-2}, "loop": {"num_steps": 24}}
    sampler = SamplerConfig(kind="ddpm" if is_dit else "sde", num_steps=3)
    if is_dit:
        settings |= {"flow": {}, "preview": {"sampler": {"kind": "ddim"}}}
    assert train_sit(sit_config(run, images, latents, autoencoder=str(maetok), **settings)) == 0
    loss = "noise" if is_dit else "velocity"
    logged = [json.loads(line)[loss] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(logged[-6:]) < 0.8 * sum(logged[:6])
    assert (run / "samples" / "samples_00000024.png").is_file()
    sit = load_sit(resolve_weights(run)).sit
    assert sit.config.latent_shape == (3, 1, 5) and sit.config.rope == switches.get("rope", False)
    drawn = tmp_path / "drawn"
    arguments = [f"--generator={run}", f"--autoencoder={maetok}", f"--out={drawn}"]
    arguments += [f"--sampler.kind={sampler.kind}", f"--sampler.num_steps={sampler.num_steps}"]
    assert main(["sample", *arguments, "--num_samples=4", "--batch_size=2"]) == 0
    pictures = load_generator(run).sample(load_pretrained(maetok), num_samples=4, batch_size=2, sampler=sampler)
    found = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted(drawn.glob("*.png"))])
    assert torch.equal(found.permute(0, 3, 1, 2), pictures.images) and found.float().std() > 1


def test_what_does_not_go_with_it_is_refused_before_a_step(maetok, latents, images, tmp_path):
    def refuses(message, **settings):
        with pytest.raises(UserError, match=message):
            train_sit(sit_config(tmp_path / "run", images, latents, loop={"num_steps": 1}, **settings))

    refuses(
        "REPA aligns tokens with the patches of a picture .* set repa.weight=0",
        repa={"foundation": {"name": "dinov2-vit-b"}},
    )
    refuses("patch_size=5 is for latents that are a grid", **GENERATOR | {"generator": {"patch_size": 5}})
    square = Autoencoder(AutoencoderConfig(base_channels=32, channel_multipliers=(1,), attention_resolutions=(),
                                           num_res_blocks=1, latent_channels=3))  # fmt: skip
    save_autoencoder(tmp_path / "square", square, torch.zeros(3), torch.ones(3))
    refuses("latents of 3 x 1 x 5 are not this autoencoder's", **GENERATOR, autoencoder=str(tmp_path / "square"))
    with pytest.raises(UserError, match=r"init_from=.* is a MAETok, which encodes and decodes here"):
        train_vae(
            vae_config(
                tmp_path / "vae", images, init_from=str(maetok), alignment={"method": "none"}, loss={"gan_weight": 0.0}
            )
        )


def test_its_latent_space_is_measured_but_for_what_needs_a_grid(maetok, images, tmp_path, capsys):
    arguments = [f"--autoencoder={maetok}", f"--train_data={images}", f"--data={images}", "--image_size=32"]
    measures = "--measures=[spectrum,sensitivity,learnability,patches]"
    small = ["--learnability.num_steps=2", "--learnability.batch_size=4", "--num_decoded=4"]
    assert main(["evaluate", "latents", *arguments, measures, *small]) == 0
    said = capsys.readouterr().out
    assert "small_sit_velocity_loss" in said
    for measure in ("spectrum", "patches"):
        assert f"{measure} is left out: it is of latents that are a grid, and these are a sequence" in said
