"""Stage 1's own losses: whole steps against a plain version in float64, with two discriminator passes on the fake."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import COMPARED, vae_config
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.errors import UserError
from sendvae_fast.ops import philox, use_backend
from sendvae_fast.train.vae.settings import VAELossConfig
from sendvae_fast.train.vae.stage import VAEStage

pytestmark = pytest.mark.slow

NUM_STEPS = 4


def batch_of(step: int) -> ImageBatch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return ImageBatch(step, torch.arange(4) + 4 * step, images, torch.zeros(4, dtype=torch.int64))


def plain_losses(settings, step, networks, x, key, ids):
    """(L of the autoencoder, the discriminator's loss), each with its own pass of the discriminator on the fake."""
    model, discriminator, lpips = networks
    output = model(x, key, ids)
    x_hat = output.reconstruction
    difference = (x - x_hat).abs() if settings.get("reconstruction", "l1") == "l1" else (x - x_hat) ** 2
    # As latent-diffusion writes it: LPIPS spread over all elements, then their mean or their sum.
    shown = (2 * x - 1, 2 * x_hat - 1) if settings["perceptual"].get("legacy_range") else (x, x_hat)
    elements = settings["reconstruction_weight"] * difference + settings["perceptual_weight"] * lpips(*shown)
    nll = elements.sum() / len(x) if settings["reduction"] == "sum" else elements.mean()
    mean, logvar = output.moments.chunk(2, 1)
    loss = nll + settings["kl_weight"] * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(x)
    start = settings["gan_start_step"]
    gan = -discriminator(x_hat).mean()
    if step >= start:
        weight = settings["gan_weight"] * min(1, (step - start + 1) / (settings["gan_warmup_steps"] or 1))
        if settings["gan_adaptive"]:
            last = model.autoencoder.decoder.conv_out.weight
            norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (nll, gan)]
            weight = weight * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
        loss = loss + weight * gan
    real, fake = discriminator(x), discriminator(x_hat.detach())
    return loss, 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def plain_steps(settings, stage) -> list[nn.Module]:
    """The stage's networks after NUM_STEPS steps in plain PyTorch and float64."""
    model = copy.deepcopy(stage.model).double()
    model.latent_norm.float()
    discriminator = copy.deepcopy(stage.judge.discriminator.module).double()
    lpips = copy.deepcopy(stage.judge.perceptual.lpips).double()
    first = settings.get("discriminator_start_step", settings["gan_start_step"])
    optimizers = [
        torch.optim.AdamW(network.parameters(), lr=config.learning_rate, eps=config.eps, weight_decay=0)
        for network, config in ((model, stage.config.optimizer), (discriminator, stage.config.discriminator_optimizer))
    ]
    for step in range(NUM_STEPS):
        batch = batch_of(step)
        key = philox.make_key(stage.config.seed, step, "cpu")
        x = batch.images.double() / 127.5 - 1
        losses = plain_losses(settings, step, (model, discriminator, lpips), x, key, batch.ids)
        for network, loss in zip((model, discriminator), losses, strict=True):
            if network is discriminator and step < first:
                continue
            gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for network, optimizer in zip((model, discriminator), optimizers, strict=True):
            if network is model or step >= first:
                optimizer.step()
    return [model, discriminator]


SETTINGS = dict(
    reconstruction_weight=1.5,
    perceptual_weight=0.7,
    reduction="mean",
    kl_weight=1e-3,
    gan_weight=0.5,
    gan_adaptive=False,
    gan_start_step=0,
    gan_warmup_steps=0,
)


@pytest.mark.parametrize(
    "changes, norm, legacy_range",
    [
        (dict(), "batch", False),
        (dict(reduction="sum", gan_adaptive=True, reconstruction="l2"), "batch", False),
        (dict(gan_start_step=1, gan_warmup_steps=3, discriminator_start_step=0), "group", True),
        (dict(gan_start_step=2), "batch", False),
    ],
    ids=["plain", "from scratch", "head start and warm-up", "late"],
)
def test_steps_equal_a_plain_version(tmp_path, perceptual, changes, norm, legacy_range):
    settings = SETTINGS | changes | {"perceptual": perceptual | {"legacy_range": legacy_range}}
    stage = VAEStage(
        vae_config(
            tmp_path,
            tmp_path,
            loss=settings,
            alignment={"method": "none", "latent_norm": "none"},
            discriminator={"norm": norm},
            engine={"name": "ddp"},
            **COMPARED,
        ),
        None,
        init_distributed("cpu"),
    )
    networks = [stage.model, stage.judge.discriminator.module]
    before = [copy.deepcopy(network) for network in networks]
    with use_backend("reference"):
        truth = plain_steps(settings, stage)
    for step in range(NUM_STEPS):
        stage.train_step(step, batch_of(step))
    for network, expected, old in zip(networks, truth, before, strict=True):
        # Where a pixel's difference is near 0, float32 may see another sign of it: an L1 term of 1 in 3072.
        assert distance(network, expected) < 5e-3 * distance(old, expected)


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((x.detach().double() - y.detach().double()).square().sum()) for x, y in pairs) ** 0.5


class HostNotes(TorchFunctionMode):
    """Notes what makes the host wait for a GPU: tensors made from Python's numbers, and numbers read from tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            self.found.append(function.__name__)
        return function(*args, **kwargs or {})


class ReadNotes(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(function.name())
        return function(*args, **kwargs or {})


def test_micro_batches_do_not_make_the_host_wait(tmp_path, images, perceptual):
    """The step's key goes to the device before them; after them the host reads the two norms of the step before."""
    engine = {"name": "ddp", "accumulation_steps": 2, "precision": "bf16"}
    stage = VAEStage(
        vae_config(
            tmp_path,
            images,
            loss=SETTINGS | {"gan_adaptive": True, "perceptual": perceptual},
            engine=engine,
            alignment={"method": "va"},
        ),
        None,
        init_distributed("cpu"),
    )
    with use_backend("reference"), HostNotes() as notes, ReadNotes(notes.found):
        stage.train_step(0, batch_of(0))
        assert notes.found == ["tensor"]
        stage.train_step(1, batch_of(1))
    assert notes.found == [*2 * ["tensor"], *2 * ["aten::_local_scalar_dense"]]


def test_gan_weight_rises_to_its_value():
    loss = VAELossConfig(gan_weight=0.4, gan_start_step=10, gan_warmup_steps=4)
    assert [loss.gan_weight_at(step) for step in (0, 9, 10, 11, 12, 13, 14, 1000)] == pytest.approx(
        [0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )
    loss = VAELossConfig(gan_weight=0.4, gan_start_step=10)
    assert [loss.gan_weight_at(step) for step in (9, 10)] == [0.0, 0.4]
    assert loss.discriminator_first_step == 10
    assert VAELossConfig(gan_start_step=10, discriminator_start_step=3).discriminator_first_step == 3


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(gan_start_step=5, discriminator_start_step=6), "loss.discriminator_start_step=6 must be between 0 and"),
        (dict(discriminator_start_step=-1), "discriminator_start_step=-1"),
        (dict(gan_warmup_steps=-1), "loss.gan_warmup_steps is -1: it must be at least 0"),
        (dict(kl_weight=float("nan")), "loss.kl_weight is nan"),
        (dict(gan_weight=-0.1), "loss.gan_weight is -0.1"),
        (dict(reduction="total"), "loss.reduction is 'total': it must be mean or sum"),
        (dict(reconstruction="mse"), "loss.reconstruction is 'mse': it must be l1 or l2"),
    ],
)
def test_impossible_losses_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        VAELossConfig(**settings)
