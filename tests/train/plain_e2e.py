"""REPA-E's step from the paper in float64, and stages to compare it with."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from models.plain_sit import plain_sit
from tiny_runs import e2e_config
from torch import nn
from torch.testing import assert_close

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.ops import philox
from sendvae_fast.train.e2e.stage import E2EStage

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


def plain_steps(stage, first=0, states=(None, None, None)):
    """Autoencoder, discriminator, SiT, its average and its batch norm after NUM_STEPS steps, from the paper in float64.

    In REPA-E's order: its batch norm is in evaluation mode for the autoencoder, in training mode for the SiT.

    Args:
        stage: what is trained.
        first: the first step.
        states: of torch's AdamW of autoencoder, discriminator and SiT, to go on from.
    """
    config = stage.config
    autoencoder = copy.deepcopy(stage.model.autoencoder).double()
    discriminator = copy.deepcopy(stage.judge.discriminator.module).double()
    bn = nn.BatchNorm2d(4, eps=1e-4, momentum=0.1, affine=False).double()
    sit = {name: value.detach().double().clone() for name, value in stage.sit.state_dict().items()}
    trained = {name: sit[name].requires_grad_() for name, _ in stage.sit.named_parameters()}
    averaged = stage.generator.full_state("ema")
    ema = {name: averaged[name].double() for name in trained}
    for name in ("running_mean", "running_var"):
        getattr(bn, name).copy_(getattr(stage.sit.bn, name))
    bn_ema = [stage.sit.bn.ema_mean.double(), stage.sit.bn.ema_var.double()]
    groups = [
        (list(autoencoder.parameters()), config.optimizer),
        (list(discriminator.parameters()), config.discriminator_optimizer),
        (list(trained.values()), config.generator_optimizer),
    ]
    optimizers = [torch.optim.AdamW(group, lr=c.learning_rate, eps=c.eps, weight_decay=0) for group, c in groups]
    for optimizer, state in zip(optimizers, states, strict=True):
        if state is not None:
            optimizer.load_state_dict(state)
    for (_, config_of_group), optimizer in zip(groups, optimizers, strict=True):
        optimizer.param_groups[0].update(lr=config_of_group.learning_rate, eps=config_of_group.eps, weight_decay=0)

    def update(number, loss):
        parameters = groups[number][0]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers[number].step()

    def align(features, target):
        return (1 - F.cosine_similarity(features, target, dim=-1)).mean()

    for step in range(first, first + NUM_STEPS):
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


def networks_of(stage):
    """Copies of autoencoder, discriminator and SiT."""
    return copy.deepcopy((stage.model.autoencoder, stage.judge.discriminator.module, stage.sit))


def assert_equals_plain(stage, truth, before):
    """Compare a stage with what `plain_steps` gave: to 0.05 % of how far the networks `before` have moved."""
    autoencoder, discriminator, sit, ema, norm = truth
    averaged = stage.generator.full_state("ema")
    for ours, wanted, old in (
        (stage.model.autoencoder.parameters(), autoencoder.parameters(), before[0].parameters()),
        (stage.judge.discriminator.module.parameters(), discriminator.parameters(), before[1].parameters()),
        (stage.sit.parameters(), sit.values(), before[2].parameters()),
        ([averaged[name] for name in ema], ema.values(), before[2].parameters()),
    ):
        ours, wanted, old = (torch.cat([x.detach().double().flatten() for x in one]) for one in (ours, wanted, old))
        assert (ours - wanted).norm() < 5e-4 * (old - wanted).norm()
    bn = stage.sit.bn
    for ours, wanted in zip((bn.running_mean, bn.running_var, bn.ema_mean, bn.ema_var), norm, strict=True):
        assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-7)
