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
from sendvae_fast.ops import philox
from sendvae_fast.train.vae.stage import VAEStage

OPTIMIZER = "optimizer"


def parts_of(stage: Any, batch: Any) -> dict[str, Call]:
    """The parts by name, each as a call that does it once."""
    calls = _vae_parts(stage, batch) if isinstance(stage, VAEStage) else _sit_parts(stage, batch)
    if foundation := frozen_networks(stage).get(FOUNDATION):
        calls[FOUNDATION] = lambda _: foundation(batch.images)
    engines = [stage.engine]
    if isinstance(stage, VAEStage) and stage.judge.discriminator is not None:
        engines.append(stage.judge.discriminator)
    return {**calls, OPTIMIZER: _updates(engines)}


def _vae_parts(stage: Any, batch: Any) -> dict[str, Call]:
    engine, network = stage.engine, stage.model
    x = to_model_range(batch.images)
    with torch.no_grad():
        output = engine(x, philox.make_key(0, 0, stage.device), batch.ids)
    x_hat, moments = output.reconstruction.detach(), output.moments.detach()
    z = moments.chunk(2, dim=1)[0].contiguous()
    calls = {
        "encoder": _trained(engine, network.autoencoder.encode, x, moments),
        "decoder": _trained(engine, network.autoencoder.decode, z.requires_grad_(), x_hat),
    }
    if network.mapper is not None:
        z_t = z.detach().flatten(2).transpose(1, 2).contiguous().requires_grad_()  # tokens of 1 x 1 patches
        target = stage.aligner.foundation(batch.images)
        calls["mapper and alignment"] = _trained(engine, lambda z: stage.aligner.loss(network.mapper(z), target), z_t)
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


def _sit_parts(stage: Any, batch: Any) -> dict[str, Call]:
    engine, config = stage.engine, stage.model.config
    size = config.latent_size
    z_t = torch.randn(len(batch.ids), config.latent_channels, size, size, device=stage.device)
    t = torch.rand(len(batch.ids), device=stage.device)
    target = None if stage.foundation is None else stage.foundation(batch.images)

    def loss(z_t: Tensor) -> Tensor:
        velocity, features = stage.model(z_t, t, batch.labels, return_features=target is not None)
        loss = velocity.float().square().mean()
        return loss if target is None else loss + alignment_loss(features, target)

    return {"SiT, projector and alignment": _trained(engine, loss, z_t)}


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
