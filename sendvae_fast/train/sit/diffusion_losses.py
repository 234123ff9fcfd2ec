"""The losses of a DiT in training: the noise, its variance, and REPA's alignment where that is asked for.

Shape letters: B batch, N tokens, D the foundation model's width.
"""

from __future__ import annotations

from torch import Tensor

from sendvae_fast.engine.engine import Engine
from sendvae_fast.losses.diffusion import noise_loss, variance_loss
from sendvae_fast.models.diffusion import Diffusion
from sendvae_fast.models.sit.sizes import DIFFUSION_STEPS
from sendvae_fast.ops import philox
from sendvae_fast.ops.noise_inject import NoiseInjectOutput
from sendvae_fast.train.sit.flow_losses import FlowSettings, predict, with_alignment


def diffusion_losses(
    engine: Engine,
    settings: FlowSettings,
    diffusion: Diffusion,
    normalised: NoiseInjectOutput,
    labels: Tensor,
    key: Tensor,
    sample_ids: Tensor,
    target: Tensor | None,
) -> dict[str, Tensor]:
    """Run a DiT at steps drawn for each sample; its loss under "loss", beside the terms. All are float32 scalars.

    Args:
        engine: of the DiT.
        settings: weight of the alignment, and the share of labels that are dropped.
        diffusion: the schedule of training, on the device.
        normalised: what `noise_inject` made of the latents at noise level 0, not as tokens.
        labels: classes, int64 [B].
        key: of the step, from which steps and dropped labels are drawn.
        sample_ids: int64 [B].
        target: the foundation model's features [B, N, D], or None without REPA.
    """
    latents, noise = normalised.z_t, normalised.velocity + normalised.z_t
    index = philox.integers(key, philox.Stream.TIME, sample_ids, 1, DIFFUSION_STEPS)[:, 0]
    z_t = diffusion.noised(latents, noise, index)
    output, features = predict(engine, settings, z_t, index.float(), labels, key, sample_ids, target is not None)
    losses = {
        "noise": noise_loss(output, noise),
        "variance": variance_loss(diffusion, output, latents, z_t, index),
    }
    return with_alignment(losses["noise"] + losses["variance"], losses, settings, features, target)
