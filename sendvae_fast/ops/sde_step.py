"""One step of the stochastic sampler: guidance, drift, update and noise in one pass over the state.

B batch, C latent channels, H W latent height and width.
"""

import math
from typing import NamedTuple

import torch

from sendvae_fast.ops import philox
from sendvae_fast.ops.dispatch import backend_for
from sendvae_fast.ops.philox import Stream
from sendvae_fast.ops.registration import register


class SdeStepOutput(NamedTuple):
    """The result of `sde_step`; both tensors are contiguous."""

    x: torch.Tensor
    """The state at t_next, [B, C, H, W], dtype of x."""
    network_input: torch.Tensor
    """The same rounded to the dtype of velocity: what the network takes next, [B, C, H, W]."""


def sde_step(
    x: torch.Tensor,
    velocity: torch.Tensor,
    times: torch.Tensor,
    key: torch.Tensor,
    sample_ids: torch.Tensor,
    *,
    guidance_scale: float | None = None,
    last: bool = False,
) -> SdeStepOutput:
    """An Euler-Maruyama step of the reverse SDE of the linear path, from noise level t to t_next.

        v = v_null + guidance_scale (v_label - v_null), or velocity itself without guidance_scale
        x' = x + ((2 - t) v + x) Δt + sqrt(2 t |Δt|) ε,    Δt = t_next - t

    The last step adds no noise. The drift is v - t score, where score = -((1 - t) v + x) / t is ∇ log p_t(x), and
    the diffusion 2 t: the sampler of SiT ("sigma" diffusion), REPA, REPA-E and Send-VAE. In SiT's own time, where data
    is at 1, the formulas of the same process differ. ε ~ N(0, 1) is Philox of (seed, step, sample id, element) on the
    stream SAMPLER_STEP: a sample draws the same noise whatever batch or rank it is in.

    Arithmetic, guidance included, has the precision of x in the order written; the coefficients are computed in float64
    first. The noise is float32 (float64 for a float64 velocity), as the published samplers draw it.

    Nothing is read back by the host: with times, key and sample_ids overwritten in between, a CUDA graph replays any
    step but the last. Inference only: no gradient passes through.

    Memory traffic of the compiled backends, S the bytes of an element of x, s of velocity: (2 S + 2 s) B C H W, s more
    with guidance. A velocity whose plane [H, W] has no single stride is copied first, and an x whose samples are not
    contiguous. There is no Triton backend: Triton takes numbers as float32, which would round the scale of a float64
    state.

    Args:
        x: the state [B, C, H, W], float64 or float32; any layout, B may be 0.
        velocity: [B, C, H, W], or [2 B, C, H, W] with guidance_scale: for the labels, then for the null class. float32,
            bfloat16, float16 or float64 (reference only), whatever x is; any layout.
        times: float64 [2], (t, t_next), on the device.
        key: int64 [2], (seed, step), see `philox.make_key`.
        sample_ids: int64 [B].
        guidance_scale: None is no guidance.
        last: whether this is the last step.

    Raises:
        ValueError: a wrong shape, dtype or device, C, H or W of 0, or C H W of 2^31 and more.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    _check(x, velocity, times, key, sample_ids, guidance_scale)
    backend = backend_for("sde_step", velocity)
    with torch.no_grad():
        if backend == "reference":
            return sde_step_reference(x, velocity, times, key, sample_ids, guidance_scale=guidance_scale, last=last)
        return SdeStepOutput(*_op(backend, x, velocity, times, key, sample_ids, guidance_scale, last))


def sde_step_reference(
    x: torch.Tensor,
    velocity: torch.Tensor,
    times: torch.Tensor,
    key: torch.Tensor,
    sample_ids: torch.Tensor,
    *,
    guidance_scale: float | None = None,
    last: bool = False,
) -> SdeStepOutput:
    """`sde_step` in plain, differentiable PyTorch."""
    t, t_next = times.unbind()
    dt = t_next - t
    v = velocity.to(x.dtype)
    if guidance_scale is not None:
        conditional, unconditional = v.chunk(2)
        v = unconditional + guidance_scale * (conditional - unconditional)
    x_next = x + ((2 - t).to(x.dtype) * v + x) * dt.to(x.dtype)
    if not last:
        precision = torch.promote_types(velocity.dtype, torch.float32)
        noise = philox.normal(key, Stream.SAMPLER_STEP, sample_ids, x.shape[1:], dtype=precision)
        x_next = x_next + torch.sqrt(2 * t * dt.abs()).to(x.dtype) * noise.to(x.dtype)
    x_next = x_next.contiguous()
    return SdeStepOutput(x_next, x_next.to(velocity.dtype, copy=True))


def _check(
    x: torch.Tensor,
    velocity: torch.Tensor,
    times: torch.Tensor,
    key: torch.Tensor,
    sample_ids: torch.Tensor,
    guidance_scale: float | None,
) -> None:
    if x.dim() != 4 or 0 in x.shape[1:] or math.prod(x.shape[1:]) >= 2**31:
        raise ValueError(f"x must be [B, C, H, W] with 0 < C H W < 2^31, got {list(x.shape)}")
    if x.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"x must be float64 or float32, got {x.dtype}")
    if velocity.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"velocity must be float32, bfloat16, float16 or float64, got {velocity.dtype}")
    batch = x.shape[0]
    num_velocities = batch if guidance_scale is None else 2 * batch
    for name, tensor, shape, dtype in (
        ("velocity", velocity, (num_velocities, *x.shape[1:]), velocity.dtype),
        ("times", times, (2,), torch.float64),
        ("key", key, (2,), torch.int64),
        ("sample_ids", sample_ids, (batch,), torch.int64),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} for x {list(x.shape)} and guidance_scale {guidance_scale}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: put all on one device")


def _fake(x, velocity, times, key, sample_ids, guidance_scale, last):
    x_next = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_next, torch.empty_like(x_next, dtype=velocity.dtype)


_op = register("sde_step", fake=_fake)
