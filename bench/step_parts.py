"""The time of a step by parts: each part by itself, with its backward pass, on the networks of a stage.

A part is run by itself on tensors of the step's shapes. Work between the parts (casts, losses of pixels, adding up of
gradients) is in none of them: their sum is less than the step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.step_cases import FOUNDATION, LPIPS, frozen_networks
from bench.timing import Call
from sendvae_fast.engine.engine import Engine
from sendvae_fast.losses.adversarial import generator_loss, hinge_discriminator_loss
from sendvae_fast.losses.alignment import alignment_loss
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.train.e2e.stage import E2EStage
from sendvae_fast.train.sit.stage import SiTStage
from sendvae_fast.train.vae.stage import VAEStage

OPTIMIZER = "optimizer"


def parts_of(stage: Any, batch: Any) -> dict[str, Call]:
    """The parts by name, each as a call that does it once."""
    if isinstance(stage, SiTStage):
        calls = _sit_parts(stage.engine, stage.foundation, batch)
    elif isinstance(stage, E2EStage):
        calls = _vae_parts(stage, batch) | _sit_parts(stage.generator, stage.foundation, batch)
        calls["alignment through the SiT"] = _alignment_through(stage, batch)
    else:
        calls = _vae_parts(stage, batch)
    if foundation := frozen_networks(stage).get(FOUNDATION):
        calls[FOUNDATION] = lambda _: foundation(batch.images)
    return {**calls, OPTIMIZER: _updates(list(stage.engines.values()))}


def _vae_parts(stage: Any, batch: Any) -> dict[str, Call]:
    engine, network = stage.engine, stage.model
    x = to_model_range(batch.images)
    with torch.no_grad(), engine.autocast():
        moments = network.autoencoder.encode(x)
        z = moments.chunk(2, dim=1)[0].contiguous()
        x_hat = network.autoencoder.decode(z)
    calls = {
        "encoder": _trained(engine, network.autoencoder.encode, x, moments),
        "decoder": _trained(engine, network.autoencoder.decode, z.requires_grad_(), x_hat),
    }
    aligner, mapper = (stage.aligner, stage.model.mapper) if isinstance(stage, VAEStage) else (None, None)
    if aligner is not None and mapper is not None:
        z_t = z.detach().flatten(2).transpose(1, 2).contiguous().requires_grad_()  # tokens of 1 x 1 patches
        target = aligner.foundation(batch.images)
        calls["mapper and alignment"] = _trained(engine, lambda z: aligner.loss(mapper(z), target), z_t)
    picture = x_hat.float().requires_grad_()
    if perceptual := frozen_networks(stage).get(LPIPS):
        calls[LPIPS] = lambda _: perceptual(x, picture).mean().backward()
    if stage.judge.discriminator is not None:
        critic = stage.judge.discriminator

        def play(number: int) -> None:
            critic.module.zero_grad(set_to_none=True)
            fake, _gradient = critic.input_gradient(picture, generator_loss)
            hinge_discriminator_loss(critic(x), fake).backward()

        calls["discriminator, both players"] = play
    return calls


def _sit_parts(engine: Engine, foundation: Any, batch: Any) -> dict[str, Call]:
    sit: Any = engine.module
    device = batch.ids.device
    z_t = torch.randn(len(batch.ids), *sit.config.latent_shape, device=device)
    t = torch.rand(len(batch.ids), device=device)
    target = None if foundation is None else foundation(batch.images)

    def loss(z_t: Tensor) -> Tensor:
        velocity, features = sit(z_t, t, batch.labels, return_features=target is not None)
        loss = velocity.float().square().mean()
        return loss if target is None else loss + alignment_loss(features, target)

    return {"SiT, projector and alignment": _trained(engine, loss, z_t)}


def _alignment_through(stage: E2EStage, batch: Any) -> Call:
    """The SiT's first blocks, forward and backward to the noised latent, no weight's gradient."""
    config, target = stage.sit.config, stage.foundation(batch.images)
    tokens, dim = config.num_tokens, config.latent_channels * config.patch_size**2
    z_t = torch.randn(len(batch.ids), tokens, dim, device=stage.device)
    t = torch.rand(len(batch.ids), device=stage.device)

    def call(_: int) -> None:
        stage.generator.input_gradient(
            z_t, lambda features: alignment_loss(features, target), lambda z: stage.sit.project(z, t, batch.labels)
        )

    return call


def _trained(engine: Engine, forward: Callable[[Tensor], Tensor], x: Tensor, like: Tensor | None = None) -> Call:
    """Forward at the engine's precision and backward, from random gradients `like` the output if it is no loss."""

    def call(_: int) -> None:
        engine.module.zero_grad(set_to_none=True)
        with engine.autocast():
            out = forward(x)
        out.backward(None if like is None else like.to(out.dtype))

    return call


def _updates(engines: list[Engine]) -> Call:
    """Norm, clipping, AdamW and EMA on random gradients, made once: the other parts drop theirs."""
    gradients = [(param, 1e-3 * torch.randn_like(param)) for engine in engines for param in engine.trained.values()]

    def call(_: int) -> None:
        for param, gradient in gradients:
            param.grad = gradient
        for engine in engines:
            engine.optimizer.step()

    return call
