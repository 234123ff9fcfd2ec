"""REPA-E: whole steps against a plain version in float64, its checkpoints, and what they are good for afterwards."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models.plain_sit import plain_sit
from tiny_runs import COMPARED_E2E, cache_of, checkpoint_tensors, e2e_config
from torch import nn
from torch.testing import assert_close

from sendvae_fast import load_generator
from sendvae_fast.cli.convert import Config as Convert
from sendvae_fast.cli.convert import run as convert
from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.ops import philox, use_backend
from sendvae_fast.train.e2e.stage import E2EStage, train_e2e

pytestmark = pytest.mark.slow

NUM_STEPS = 3
HEADS, BLOCK, CLASSES = 2, 1, 5
EMA = 0.9


def batch_of(step: int) -> ImageBatch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (4,), generator=generator)
    return ImageBatch(step, torch.arange(4) + 4 * step, images, labels)


def stage_of(tmp_path, **settings) -> E2EStage:
    """A stage whose layers that start at zero are random: every path carries a gradient from the first step on."""
    images = SimpleNamespace(catalog=SimpleNamespace(class_names=["class"] * CLASSES))
    stage = E2EStage(e2e_config(tmp_path, tmp_path, **settings), images, init_distributed("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in stage.sit.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    # The average started as a copy of what the parameters were.
    stage.generator.load_model(stage.generator.full_state("model"))
    return stage


def plain_steps(stage):
    """Autoencoder, discriminator, SiT, its average and its batch norm after NUM_STEPS steps, from the paper in float64.

    In REPA-E's order: its batch norm is in evaluation mode for the autoencoder, in training mode for the SiT.
    """
    config = stage.config
    autoencoder = copy.deepcopy(stage.model.autoencoder).double()
    discriminator = copy.deepcopy(stage.judge.discriminator.module).double()
    bn = nn.BatchNorm2d(4, eps=1e-4, momentum=0.1, affine=False).double()
    sit = {name: value.detach().double().clone() for name, value in stage.sit.state_dict().items()}
    trained = {name: sit[name].requires_grad_() for name, _ in stage.sit.named_parameters()}
    ema = {name: value.detach().clone() for name, value in trained.items()}
    bn_ema = [bn.running_mean.clone(), bn.running_var.clone()]
    groups = [
        (list(autoencoder.parameters()), config.optimizer),
        (list(discriminator.parameters()), config.discriminator_optimizer),
        (list(trained.values()), config.generator_optimizer),
    ]
    optimizers = [torch.optim.AdamW(group, lr=c.learning_rate, eps=c.eps, weight_decay=0) for group, c in groups]

    def update(number, loss):
        parameters = groups[number][0]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers[number].step()

    def align(features, target):
        return (1 - F.cosine_similarity(features, target, dim=-1)).mean()

    for step in range(NUM_STEPS):
        batch = batch_of(step)
        key = philox.make_key(config.seed, step)
        x, target = batch.images.double() / 127.5 - 1, stage.foundation(batch.images).double()
        mean, logvar = autoencoder.encode(x).chunk(2, 1)
        shape = mean.shape[1:]
        first, second = (
            philox.normal(key, stream, batch.ids, shape, dtype=torch.float64)
            for stream in (philox.Stream.POSTERIOR, philox.Stream.INTERPOLANT)
        )
        t = philox.uniform(key, philox.Stream.TIME, batch.ids, 1)[:, 0].double()
        level = t[:, None, None, None]
        z = mean + torch.exp(0.5 * logvar) * first

        x_hat = autoencoder.decode(z)
        bn.eval()
        z_t = (1 - level) * bn(z) + level * second
        frozen = {name: value.detach() for name, value in sit.items()}
        features = plain_sit(frozen, z_t, t, batch.labels, num_heads=HEADS, repa_block=BLOCK)[1]
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(x)
        gan = -discriminator(x_hat).mean()
        real, fake = discriminator(x), discriminator(x_hat.detach())
        loss = (x - x_hat).abs().mean() + 1e-3 * kl + 0.1 * gan + 1.5 * align(features, target)
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        latents = z.detach()
        update(0, loss)
        update(1, hinge)

        bn.train()
        normalised = bn(latents)
        z_t = (1 - level) * normalised + level * second
        dropped = philox.uniform(key, philox.Stream.LABEL_DROPOUT, batch.ids, 1)[:, 0] < config.generator.label_dropout
        labels = torch.where(dropped, CLASSES, batch.labels)
        velocity, features = plain_sit(sit, z_t, t, labels, num_heads=HEADS, repa_block=BLOCK)
        update(2, (velocity - (second - normalised)).square().mean() + 0.5 * align(features, target))
        with torch.no_grad():
            for name, value in trained.items():
                ema[name].lerp_(value, 1 - EMA)
            for average, value in zip(bn_ema, (bn.running_mean, bn.running_var), strict=True):
                average.lerp_(value, 1 - EMA)
    return autoencoder, discriminator, trained, ema, [bn.running_mean, bn.running_var, *bn_ema]


def test_steps_equal_a_plain_version(tmp_path):
    settings = {"loss": {"kl_weight": 1e-3}, "generator": {"label_dropout": 0.4}, "engine": {"name": "ddp"}}
    stage = stage_of(tmp_path, **settings, **COMPARED_E2E)
    before = copy.deepcopy((stage.model.autoencoder, stage.judge.discriminator.module, stage.sit))
    with use_backend("reference"):
        autoencoder, discriminator, sit, ema, norm = plain_steps(stage)
    for step in range(NUM_STEPS):
        stage.train_step(step, batch_of(step))
    averaged = stage.generator.full_state("ema")
    for ours, truth, old in (
        (stage.model.autoencoder.parameters(), autoencoder.parameters(), before[0].parameters()),
        (stage.judge.discriminator.module.parameters(), discriminator.parameters(), before[1].parameters()),
        (stage.sit.parameters(), sit.values(), before[2].parameters()),
        ([averaged[name] for name in ema], ema.values(), before[2].parameters()),
    ):
        ours, truth, old = (torch.cat([part.detach().double().flatten() for part in one]) for one in (ours, truth, old))
        assert (ours - truth).norm() < 5e-3 * (old - truth).norm()
    bn = stage.sit.bn
    for ours, truth in zip((bn.running_mean, bn.running_var, bn.ema_mean, bn.ema_var), norm, strict=True):
        assert_close(ours.double(), truth, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_train_what_the_whole_does(tmp_path):
    stages = [stage_of(tmp_path, engine={"accumulation_steps": num}, **COMPARED_E2E) for num in (1, 2)]
    for step in range(2):
        logged = [stage.train_step(step, batch_of(step)) for stage in stages]
        for name, value in logged[0].items():
            assert_close(torch.as_tensor(logged[1][name]), torch.as_tensor(value), rtol=1e-3, atol=1e-5, msg=name)
    for one, two in zip(stages[0].sit.state_dict().values(), stages[1].sit.state_dict().values(), strict=True):
        assert_close(two, one, rtol=1e-3, atol=2e-5)


def test_a_step_with_nan_changes_nothing(tmp_path):
    stage = stage_of(tmp_path, engine={"name": "ddp"})
    stage.train_step(0, batch_of(0))
    stage.generator.num_skipped = stage.engine.num_skipped = 0
    before = [copy.deepcopy(part.full_state("model")) for part in (stage.engine, stage.generator)]
    with torch.no_grad():
        weight = stage.model.autoencoder.decoder.conv_in.weight
        kept = weight[0, 0, 0, 0].clone()
        # Reaches the autoencoder's loss, and through the latents' moments nothing of the generator's.
        weight[0, 0, 0, 0] = torch.nan
    stage.train_step(1, batch_of(1))
    with torch.no_grad():
        weight[0, 0, 0, 0] = kept
    assert stage.engine.num_skipped == 1 and stage.generator.num_skipped == 0
    for name, value in stage.engine.full_state("model").items():
        assert torch.equal(value, before[0][name]), name

    with torch.no_grad():
        stage.sit.final_layer.linear.weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in stage.sit.bn.state_dict().items()}
    stage.train_step(2, batch_of(2))
    assert stage.generator.num_skipped == 1
    for name, value in stage.sit.bn.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("e2e") / "run"
    train_e2e(e2e_config(path, images, loop={"num_steps": 5}))
    return path


def test_resume_equals_the_uninterrupted_run(run, images, tmp_path):
    for stop in (3, 5):
        train_e2e(e2e_config(tmp_path / "parts", images, loop={"num_steps": stop}))
    whole, parts = checkpoint_tensors(run, 5), checkpoint_tensors(tmp_path / "parts", 5)
    assert whole.keys() == parts.keys() and "latent_norm.safetensors:bn.ema_var" in whole
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_a_run_is_an_autoencoder_and_a_generator(run, images, tmp_path):
    folder = run / "checkpoints" / "step_00000005"
    saved, sit = load_autoencoder(folder), load_sit(folder)
    tensors = checkpoint_tensors(run, 5)
    for kept in (saved, sit):
        assert_close(kept.latent_mean, tensors["latent_norm.safetensors:bn.ema_mean"])
        assert_close(kept.latent_std, tensors["latent_norm.safetensors:bn.ema_var"].sqrt())
    latents = cache_of(run, images, tmp_path / "latents")
    assert (latents / "cache.json").is_file()
    generator = load_generator(run)
    assert sorted(file.name for file in (run / "samples").iterdir()) == [
        "reconstruction_00000005.png", "samples_00000005.png",
    ]  # fmt: skip
    assert generator is not None


def test_a_checkpoint_in_repa_es_layout_has_all_three_networks(run, images, tmp_path):
    """That published sizes are read from such a file is tested in `models/test_sit_layouts.py`."""
    convert(Convert(source=str(run), to="repa-e", out=str(tmp_path / "theirs")))
    file = tmp_path / "theirs" / "generator.pt"
    content, tensors = torch.load(file, weights_only=True), checkpoint_tensors(run, 5)
    assert content.keys() == {"model", "ema", "vae", "discriminator"}
    kept = {
        "ema": "generator/ema",
        "model": "generator/model",
        "vae": "autoencoder/model",
        "discriminator": "discriminator",
    }
    for name, weights in kept.items():
        state = {key: value for key, value in content[name].items() if not key.startswith("bn.")}
        assert state and all(
            torch.equal(value, tensors[f"{weights}.safetensors:{key}"]) for key, value in state.items()
        )
    assert_close(content["ema"]["bn.running_var"], tensors["latent_norm.safetensors:bn.ema_var"])
    discriminator = stage_of(tmp_path, discriminator_from=str(file)).judge.discriminator.module
    for key, value in discriminator.state_dict().items():
        assert torch.equal(value, content["discriminator"][key]), key


def test_the_autoencoder_goes_to_diffusers(run, tmp_path):
    convert(Convert(source=str(run), to="diffusers", out=str(tmp_path / "vae")))
    card = (tmp_path / "vae" / "README.md").read_text()
    assert "through a generator (REPA-E), weight 1.5" in card and "5 steps of 8 pictures" in card


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"repa": {"weight": 0.0}}, "must be above 0: without alignment nothing of the generator reaches"),
        ({"generator_optimizer": {"ema_decay": None}}, "generator_optimizer.ema_decay is null"),
        ({"engine": {"zero_stage": 3}}, "zero_stage=3 splits the generator's weights"),
        ({"repa": {"block": 3}}, "repa.block=3 must be between 1 and depth=2"),
        ({"generator": {"patch_size": 3}}, "times generator.patch_size=3"),
        ({"generator": {"patch_size": 2}}, "gives 8 x 8 .* latents give 4 x 4"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(settings, words, images, tmp_path):
    with pytest.raises(UserError, match=words):
        train_e2e(e2e_config(tmp_path / "run", images, loop={"num_steps": 1}, **settings))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
