"""Every alignment method in a run: what it builds, how it is weighed, that it resumes, what it refuses."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import checkpoint_tensors, vae_config

from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.errors import UserError
from sendvae_fast.losses.alignment import vf_loss
from sendvae_fast.models.autoencoder.storage import load_autoencoder, save_autoencoder
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS
from sendvae_fast.models.mappers.linear_mapper import LinearMapper
from sendvae_fast.models.mappers.mlp_mapper import MLPMapper
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.ops import philox
from sendvae_fast.train.training_images import TrainingImages
from sendvae_fast.train.vae.networks import build_model
from sendvae_fast.train.vae.stage import VAEStage, train_vae

pytestmark = pytest.mark.slow

MAPPERS = {"va": LinearMapper, "reals": MLPMapper, "none": type(None)}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stage_of(config):
    images = TrainingImages(config.data, config.seed, config.engine.accumulation_steps, init_distributed("cpu"))
    return VAEStage(config, images, init_distributed("cpu"))


@pytest.mark.parametrize("method", MAPPERS)
def test_trains_and_resumes(method, images, tmp_path):
    settings = {"alignment": {"method": method}, "loss": {"gan_adaptive": True}, "engine": {"accumulation_steps": 2}}
    for name, stops in {"whole": (3,), "parts": (2, 3)}.items():
        for stop in stops:
            train_vae(vae_config(tmp_path / name, images, loop={"num_steps": stop}, **settings))
    whole, parts = (checkpoint_tensors(tmp_path / name, 3) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    logged = metrics(tmp_path / "whole")
    assert ("align" in logged[0]) == (method != "none") and ("align_weight" in logged[0]) == (method != "none")
    saved = load_file(tmp_path / "whole" / "checkpoints" / "step_00000003" / "mapper.safetensors")
    assert any(name.startswith("mapper.") for name in saved) == (method != "none")


@pytest.mark.parametrize("method", MAPPERS)
def test_builds_what_it_needs_and_no_more(method, images, tmp_path):
    # A foundation model that is not there: `none` must not miss it.
    foundation = {"name": "dinov2-vit-b", "weights": "missing.pth"} if method == "none" else {"name": "demo"}
    stage = stage_of(vae_config(tmp_path, images, alignment={"method": method, "foundation": foundation}))
    assert type(stage.model.mapper) is MAPPERS[method]
    assert (stage.aligner is None) == (method == "none")


@pytest.mark.parametrize("engine", [{"name": "ddp", "recompute": True}, {"zero_stage": 0}, {"zero_stage": 2}])
def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_encoders_last_layer(engine, images, tmp_path):
    settings = {"alignment": {"method": "va", "latent_norm": "none"}, "loss": {"gan_weight": 0.0}}
    stage = stage_of(vae_config(tmp_path, images, engine=engine, **settings))
    batch = next(stage.batches(0))
    logged = stage.train_step(0, batch)

    config = vae_config(tmp_path, images, engine=engine, **settings)
    torch.manual_seed(config.seed)
    model = build_model(config, stage.aligner.foundation)
    x = to_model_range(batch.images)
    output = model(x, philox.make_key(config.seed, 0, "cpu"), batch.ids)
    nll = (x - output.reconstruction).abs().mean()
    vf = vf_loss(output.features, stage.aligner.foundation(batch.images))
    weight = model.autoencoder.encoder.conv_out.weight
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (nll, vf)]
    factor = norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(logged["align_weight"], 0.1 * factor, rtol=1e-4, atol=0)
    kl = 1e-6 * logged["kl"]
    torch.testing.assert_close(logged["loss"], (nll + 0.1 * factor * vf).detach() + kl, rtol=1e-5, atol=0)
    # The engine has seen the loss once: its norm is that of the plain gradients.
    (nll + 0.1 * factor.detach() * vf + 1e-6 * kl_of(output.moments)).backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    assert logged["grad_norm"] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-4)


def kl_of(moments):
    mean, logvar = moments.chunk(2, dim=1)
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def test_latents_can_be_scaled_by_one_factor(images, tmp_path):
    settings = {"alignment": {"method": "none", "latent_norm": "scale"}, "loss": {"gan_weight": 0.0}}
    config = vae_config(tmp_path / "run", images, **settings)
    expected = torch.zeros(4), torch.full((4,), 1 / 0.18215)
    model = build_model(config, None)
    assert all(map(torch.equal, model.latent_norm.statistics(), expected))
    # Whatever the statistics of the weights are; and the factor stays with what is exported.
    save_autoencoder(tmp_path / "vae", model.autoencoder, torch.ones(4), torch.ones(4))
    config = dataclasses.replace(config, init_from=str(tmp_path / "vae"))
    assert all(map(torch.equal, build_model(config, None).latent_norm.statistics(), expected))
    config.loop.num_steps = 1
    train_vae(config)
    saved = load_autoencoder(tmp_path / "run" / "checkpoints" / "step_00000001")
    assert torch.equal(saved.latent_mean, expected[0]) and torch.equal(saved.latent_std, expected[1])


def test_files_may_lie_elsewhere_when_a_run_resumes(images, tmp_path):
    for steps, name in enumerate(("here.safetensors", "there.safetensors"), start=1):
        weights = shutil.copy(DEMO_WEIGHTS, tmp_path / name)
        foundation = {"name": "demo", "weights": str(weights)}
        train_vae(vae_config(tmp_path / "run", images, loop={"num_steps": steps}, alignment={"foundation": foundation}))
        weights.unlink()
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alignment": {"method": "none", "weight": 1.0}}, "nothing to weigh"),
        ({"alignment": {"weight": -1.0}}, "alignment.weight is -1"),
        ({"alignment": {"patch_size": 0}}, "patch_size is 0"),
        ({"alignment": {"patch_size": 3}}, "patch_size=3"),
        ({"alignment": {"va": {"cos_margin": -0.5}}}, "alignment.va.cos_margin is -0.5"),
        ({"alignment": {"va": {"cos_weight": 0.0, "distmat_weight": 0.0}}}, "both 0"),
        ({"alignment": {"send": {"depth": -1}}}, "^alignment.send.depth is -1: it must be at least 0"),
        ({"alignment": {"send": {"width": 30, "num_heads": 3}}}, "^alignment.send.width=30 must be .* num_heads=3"),
        ({"data": {"num_threads": 0}}, "^data.num_threads is 0"),
        ({"alignment": {"reals": {"width": 0}}}, "alignment.reals.width is 0"),
        ({"alignment": {"reals": {"patch_weight": 0.0, "global_weight": 0.0}}}, "both 0"),
        ({"alignment": {"latent_norm": "scale", "latent_scale": 0.0}}, "latent_scale is 0.0: .* above 0"),
        ({"alignment": {"method": "va"}, "engine": {"zero_stage": 3}}, "zero_stage 0 to 2"),
    ],
)
def test_bad_settings_are_one_clear_line(images, tmp_path, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        train_vae(vae_config(tmp_path / "run", images, **settings))
    assert "\n" not in str(caught.value)
