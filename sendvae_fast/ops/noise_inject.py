"""Sample a latent, normalise it, and noise it: one pass over the encoder's output.

B batch, C latent channels, H W latent height and width, P patch size, N = (H / P) (W / P) tokens.
"""

import math
from typing import NamedTuple

import torch

from sendvae_fast.ops import philox
from sendvae_fast.ops.dispatch import backend_for
from sendvae_fast.ops.philox import Stream
from sendvae_fast.ops.registration import register

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class NoiseInjectOutput(NamedTuple):
    """The result of `noise_inject`; every tensor is contiguous."""

    z: torch.Tensor
    """Sampled latent, not normalised (what the decoder takes), [B, C, H, W], dtype of mean; [0] if not needed."""
    z_t: torch.Tensor
    """Normalised latent at noise level t (what the mapper or SiT takes), [B, C, H, W] or, patchified,
    [B, N, C P P], dtype of mean."""
    velocity: torch.Tensor
    """Flow target ε₂ - n, [B, C, H, W], dtype of mean; [0] if not needed."""
    t: torch.Tensor
    """Noise level of each sample, float32 [B], no gradient."""


def noise_inject(
    mean: torch.Tensor,
    spread: torch.Tensor,
    latent_mean: torch.Tensor,
    latent_std: torch.Tensor,
    key: torch.Tensor,
    sample_ids: torch.Tensor,
    t: torch.Tensor | None = None,
    *,
    spread_is_std: bool = False,
    patch_size: int | None = None,
    need_z: bool = True,
    need_velocity: bool = True,
) -> NoiseInjectOutput:
    """Reparameterise, normalise by the latent statistics, and interpolate with noise.

        std = exp(0.5 clamp(spread, -30, 20)), or spread with spread_is_std
        z = mean + std ε₁
        n = (z - latent_mean) / latent_std
        z_t = (1 - t) n + t ε₂
        velocity = ε₂ - n

    With a patch size, z_t comes as tokens, ready for a patch embedding to be one matrix product: the token of patch
    (r, s) is number r W / P + s, and its feature c P P + i P + j is z_t[c, r P + i, s P + j].

    This is Eq. 1 of the Send-VAE paper with α = 1 - t. ε₁, ε₂ ~ N(0, 1) and t ~ U(0, 1) are Philox numbers of
    (seed, step, sample id, element), see `philox`, on the streams POSTERIOR, INTERPOLANT and TIME: a sample draws the
    same noise whatever batch or rank it is in. Arithmetic is float32 inside, float64 for float64 inputs.

    Gradients reach mean and spread, once (no double backward; the reference has it). With g the gradient of z plus
    ((1 - t) grad_z_t - grad_velocity) / latent_std: grad_mean = g, and grad_spread = g 0.5 std ε₁ where the clamp does
    not bind (else 0), or g ε₁ with spread_is_std. The noise is drawn again in the backward pass, never saved; key,
    sample_ids and the rest must not be modified in place in between.

    Memory traffic of the compiled and Triton backends, s the bytes of an element: 5 s B C H W forward (mean, spread in;
    one to three out), 4 s B C H W and up backward (spread and one to three gradients in; two out). The compiled
    backward reads all three gradients; missing ones are zeros expanded from one element.

    Args:
        mean: [B, C, H, W], float32, bfloat16, float16 or float64 (reference only); any layout, B may be 0.
        spread: like mean; the log-variance, or the standard deviation with spread_is_std.
        latent_mean: float32 [C], mean of the latents over the data.
        latent_std: float32 [C], their standard deviation, positive.
        key: int64 [2], (seed, step), see `philox.make_key`; read on the device, so safe in a CUDA graph.
        sample_ids: int64 [B].
        t: float32 [B] to use instead of the drawn noise level; zeros give z_t = n.
        spread_is_std: what spread means.
        patch_size: P, to get z_t as tokens [B, N, C P P]; must divide H and W. None: z_t is [B, C, H, W].
        need_z: False leaves z out: it comes empty, and is not written.
        need_velocity: the same of velocity.

    Raises:
        ValueError: a wrong shape, dtype or device, C, H or W of 0, C H W of 2^31 and more, or a patch size that does
            not divide H and W.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    _check(mean, spread, latent_mean, latent_std, key, sample_ids, t, patch_size)
    backend = backend_for("noise_inject", mean)
    if backend == "reference":
        return noise_inject_reference(
            mean, spread, latent_mean, latent_std, key, sample_ids, t,
            spread_is_std=spread_is_std, patch_size=patch_size, need_z=need_z, need_velocity=need_velocity,
        )  # fmt: skip
    outputs = _op.with_gradient(
        backend, 4, mean, spread, latent_mean, latent_std, key, sample_ids, t, spread_is_std, patch_size, need_z,
        need_velocity,
    )  # fmt: skip
    return NoiseInjectOutput(*outputs)


def noise_inject_reference(
    mean: torch.Tensor,
    spread: torch.Tensor,
    latent_mean: torch.Tensor,
    latent_std: torch.Tensor,
    key: torch.Tensor,
    sample_ids: torch.Tensor,
    t: torch.Tensor | None = None,
    *,
    spread_is_std: bool = False,
    patch_size: int | None = None,
    need_z: bool = True,
    need_velocity: bool = True,
) -> NoiseInjectOutput:
    """`noise_inject` in plain, differentiable PyTorch; float64 inputs are computed in float64 throughout."""
    compute = torch.promote_types(mean.dtype, torch.float32)
    if spread_is_std:
        std = spread.to(compute)
    else:
        # Not torch.clamp: its gradient at the ends themselves depends on the version of PyTorch. Here it is 1.
        logvar = spread.to(compute)
        logvar = torch.where(logvar < LOGVAR_MIN, LOGVAR_MIN, torch.where(logvar > LOGVAR_MAX, LOGVAR_MAX, logvar))
        std = torch.exp(0.5 * logvar)
    shape = mean.shape[1:]
    posterior_noise = philox.normal(key, Stream.POSTERIOR, sample_ids, shape, dtype=compute)
    noise = philox.normal(key, Stream.INTERPOLANT, sample_ids, shape, dtype=compute)
    t = philox.uniform(key, Stream.TIME, sample_ids, 1)[:, 0] if t is None else t.detach().clone()
    level = t.to(compute)[:, None, None, None]  # [B, 1, 1, 1]
    z = mean.to(compute) + std * posterior_noise
    offset, scale = (x.detach().to(compute)[:, None, None] for x in (latent_mean, latent_std))  # [C, 1, 1]
    normalised = (z - offset) / scale
    z_t = (1.0 - level) * normalised + level * noise
    velocity = noise - normalised
    if patch_size is not None:
        z_t = _to_tokens(z_t, patch_size)
    z, z_t, velocity = (
        x.to(mean.dtype).contiguous() if needed else mean.new_empty(0)
        for x, needed in ((z, need_z), (z_t, True), (velocity, need_velocity))
    )
    return NoiseInjectOutput(z, z_t, velocity, t)


def _to_tokens(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Maps [B, C, H, W] to [B, N, C P P] (`pixel_unshuffle` forgets the shape of an empty batch)."""
    rows, columns = (size // patch_size for size in x.shape[2:])
    patches = x.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))  # [B, C, row, P, column, P]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _check(
    mean: torch.Tensor,
    spread: torch.Tensor,
    latent_mean: torch.Tensor,
    latent_std: torch.Tensor,
    key: torch.Tensor,
    sample_ids: torch.Tensor,
    t: torch.Tensor | None,
    patch_size: int | None,
) -> None:
    if mean.dim() != 4 or 0 in mean.shape[1:] or math.prod(mean.shape[1:]) >= 2**31:
        raise ValueError(f"mean must be [B, C, H, W] with 0 < C H W < 2^31, got {list(mean.shape)}")
    if mean.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"mean must be float32, bfloat16, float16 or float64, got {mean.dtype}")
    if patch_size is not None and (patch_size < 1 or any(size % patch_size for size in mean.shape[2:])):
        raise ValueError(f"patch_size must be positive and divide H and W of mean {list(mean.shape)}, got {patch_size}")
    batch, channels = mean.shape[:2]
    expected = [
        ("spread", spread, tuple(mean.shape), mean.dtype),
        ("latent_mean", latent_mean, (channels,), torch.float32),
        ("latent_std", latent_std, (channels,), torch.float32),
        ("key", key, (2,), torch.int64),
        ("sample_ids", sample_ids, (batch,), torch.int64),
    ]
    if t is not None:
        expected.append(("t", t, (batch,), torch.float32))
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} for mean {list(mean.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != mean.device:
            raise ValueError(f"{name} is on {tensor.device}, mean on {mean.device}: put all on one device")


def _fake(mean, spread, latent_mean, latent_std, key, sample_ids, t, spread_is_std, patch_size, need_z, need_velocity):
    z, z_t, velocity = (
        torch.empty_like(mean, memory_format=torch.contiguous_format) if needed else mean.new_empty(0)
        for needed in (need_z, True, need_velocity)
    )
    if patch_size is not None:
        batch, channels, height, width = mean.shape
        area = patch_size * patch_size
        z_t = mean.new_empty(batch, height * width // area, channels * area)
    return z, z_t, velocity, latent_mean.new_empty(mean.shape[0])


def _fake_backward(grad_z, grad_z_t, grad_velocity, spread, latent_std, key, sample_ids, t, spread_is_std, patch_size):
    return tuple(torch.empty_like(spread, memory_format=torch.contiguous_format) for _ in range(2))


def _setup_context(ctx, inputs, output):
    _, spread, _, latent_std, key, sample_ids, _, spread_is_std, patch_size, need_z, need_velocity = inputs
    z, z_t, velocity, t = output
    ctx.save_for_backward(spread, latent_std, key, sample_ids, t)
    ctx.spread_is_std, ctx.patch_size, ctx.z_t_shape = spread_is_std, patch_size, z_t.shape
    ctx.mark_non_differentiable(t, *([] if need_z else [z]), *([] if need_velocity else [velocity]))
    # Stage 1 uses z and z_t, stage 2 z_t and velocity: zeros for the other would be a needless pass over memory.
    ctx.set_materialize_grads(False)


def _backward(op, ctx, grad_z, grad_z_t, grad_velocity, _grad_t):
    spread, latent_std, key, sample_ids, t = ctx.saved_tensors
    grads = [
        spread.new_zeros(()).expand(shape) if grad is None else grad
        for grad, shape in ((grad_z, spread.shape), (grad_z_t, ctx.z_t_shape), (grad_velocity, spread.shape))
    ]
    grad_mean, grad_spread = op(*grads, spread, latent_std, key, sample_ids, t, ctx.spread_is_std, ctx.patch_size)
    return grad_mean, grad_spread, *[None] * 9


_op = register(
    "noise_inject", fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, backward=_backward
)
