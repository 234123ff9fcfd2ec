"""DiT in stage 2: its losses against their definition, its way from a preset to pictures, and its published weights."""

import json

import pytest
import torch
from models.plain_sit import plain_sit
from tiny_runs import cache_of, sit_config, vae_config
from torch.testing import assert_close

from sendvae_fast import load_generator
from sendvae_fast.cli.convert import Config as Convert
from sendvae_fast.cli.convert import run as convert
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.losses.diffusion import variance_loss
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.diffusion import Diffusion
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.ops import philox
from sendvae_fast.sampling.generate import LatentDecoder, generate
from sendvae_fast.sampling.settings import GenerateConfig, SamplerConfig
from sendvae_fast.train.sit.latent_batches import LatentBatch, TrainingLatents
from sendvae_fast.train.sit.stage import SiTStage, train_sit
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

DIT = {"generator": {"diffusion": True}, "preview": {"sampler": {"kind": "ddim"}}}


@pytest.fixture(scope="module")
def autoencoder(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "vae"
    settings = {"alignment": {"method": "none"}, "loss": {"gan_weight": 0.0}}
    train_vae(vae_config(run, images, loop={"num_steps": 5}, **settings))
    return run


@pytest.fixture(scope="module")
def latents(autoencoder, images, tmp_path_factory):
    return cache_of(autoencoder, images, tmp_path_factory.mktemp("latents") / "cache")


@pytest.fixture(scope="module")
def run(images, latents, autoencoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "run"
    settings = {**DIT, "optimizer": {"learning_rate": 1e-2}, "loop": {"num_steps": 40}}
    train_sit(sit_config(path, images, latents, autoencoder=str(autoencoder), **settings))
    return path


def test_losses_are_those_of_the_definition(images, latents, tmp_path):
    """In float64, with the plain network, noise and variance of one step; the alignment is REPA's as it stands."""
    config = sit_config(tmp_path, images, latents, repa={"weight": 0.0}, **DIT)
    ranks = init_distributed("cpu")
    data = TrainingLatents(
        str(latents), config.data, config.reader, with_images=False, seed=0, accumulation_steps=1, distributed=ranks
    )
    stage = SiTStage(config, data, ranks)
    torch.manual_seed(0)
    stage.engine.load_model({name: torch.randn_like(x) * 0.1 for name, x in stage.engine.full_state("model").items()})
    ids, labels = torch.arange(6), torch.tensor([0, 5, 2, 3, 1, 4])
    mean, std = torch.randn(6, 4, 8, 8), torch.rand(6, 4, 8, 8)
    key = philox.make_key(config.seed, 3)
    state = {name: value.double() for name, value in stage.model.state_dict().items()}
    logged = stage.train_step(3, LatentBatch(ids, mean, std, labels, None))

    first, second = (
        philox.normal(key, stream, ids, (4, 8, 8), dtype=torch.float64)
        for stream in (philox.Stream.POSTERIOR, philox.Stream.INTERPOLANT)
    )
    offset, scale = (x.double()[:, None, None] for x in (stage.latent_mean, stage.latent_std))
    z = (mean.double() + std.double() * first - offset) / scale
    steps = philox.integers(key, philox.Stream.TIME, ids, 1, 1000)[:, 0]
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[steps][:, None, None, None]
    z_t = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * second
    dropped = philox.uniform(key, philox.Stream.LABEL_DROPOUT, ids, 1)[:, 0] < 0.1
    shown = torch.where(dropped, data.num_classes, labels)
    noise, _ = plain_sit(state, z_t, steps.double(), shown, num_heads=2)
    assert float(logged["noise"]) == pytest.approx(float((noise - second).square().mean()), rel=1e-4)
    # The variance's half of the output, from our network in float64; its loss has tests of its own.
    network = SiT(stage.model.config).double()
    network.load_state_dict(state)
    with torch.no_grad():
        output, _ = network(z_t, steps.double(), shown)
    # Time is embedded in float32, where an angle of up to 999 is off by as much as 6e-5.
    assert_close(output[:, :4], noise, rtol=0, atol=1e-4)
    bound = variance_loss(Diffusion.of(), output, z, z_t, steps)
    assert float(logged["variance"]) == pytest.approx(float(bound), rel=1e-3)
    assert float(logged["loss"]) == pytest.approx(float(logged["noise"] + logged["variance"]), rel=1e-6)


def test_training_learns_the_noise(run):
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    start, end = (sum(entry["noise"] for entry in part) for part in (logged[:8], logged[-8:]))
    assert end < 0.9 * start and all(entry["align"] > 0 for entry in logged)
    assert (run / "samples" / "samples_00000040.png").is_file()


def test_a_run_draws_pictures_by_ddpm_and_by_nothing_that_is_for_flows(run, autoencoder):
    saved = load_sit(resolve_weights(run))
    decoder = LatentDecoder(load_autoencoder(resolve_weights(autoencoder)).autoencoder, *saved[1:3])

    def draw(kind):
        config = GenerateConfig(batch_size=2, guidance_scale=1.5, sampler=SamplerConfig(kind=kind, num_steps=3))
        return torch.cat([batch.images for batch in generate(saved.sit, decoder, torch.arange(3), config)])

    assert draw("ddpm").shape == (3, 3, 32, 32) and not torch.equal(draw("ddpm"), draw("ddim"))
    with pytest.raises(UserError, match="sampler.kind is sde, but the generator is a DiT: give ddpm or ddim"):
        draw("sde")
    assert load_generator(run) is not None


def test_published_weights_are_a_dit_when_that_is_said(tmp_path):
    config = SiTConfig.preset("DiT-S/2", depth=1, latent_channels=4, latent_size=8, num_classes=10)
    torch.manual_seed(0)
    theirs = SiT(config)
    state = {name: torch.randn_like(value) for name, value in theirs.state_dict().items()}
    state["pos_embed"] = theirs.pos_embed
    theirs.load_state_dict(state)
    torch.save(state, tmp_path / "DiT-S-2.pt")
    source, out = str(tmp_path / "DiT-S-2.pt"), str(tmp_path / "dit")
    convert(Convert(source=source, dit=True, scaling_factor=0.18215, to="generator", out=out))
    ours = load_sit(tmp_path / "dit").sit
    assert ours.config.diffusion
    z_t, steps, labels = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.equal(ours(z_t, steps, labels)[0], theirs(z_t, steps, labels)[0])
    # Unsaid, they are taken for SiT's, which have the same names and shapes.
    assert not load_sit(tmp_path / "DiT-S-2.pt", scaling_factor=0.18215).sit.config.diffusion


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"flow": {"direction_weight": 1.0}}, "flow.* is for flows: a DiT"),
        ({"preview": {"sampler": {"kind": "sde"}}}, "sampler.kind is sde, but the generator is a DiT"),
    ],
)
def test_what_is_for_flows_is_refused_before_the_first_step(settings, words, images, latents, autoencoder, tmp_path):
    both = {**DIT, **settings, "autoencoder": str(autoencoder), "loop": {"num_steps": 1}}
    with pytest.raises(UserError, match=words.replace("*", r"\*")):
        train_sit(sit_config(tmp_path / "run", images, latents, **both))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_other_weights_are_no_dit(tmp_path):
    flow = SiT(SiTConfig.preset("SiT-S/2", depth=1, latent_channels=4, latent_size=8, num_classes=10))
    torch.save(flow.state_dict(), tmp_path / "sit.pt")
    with pytest.raises(UserError, match="is no DiT: its last layer has no outputs for the variance"):
        load_sit(tmp_path / "sit.pt", scaling_factor=1.0, is_dit=True)
    with pytest.raises(UserError, match="--dit is for --to=generator"):
        Convert(source="x", dit=True, to="repa", out="y")
