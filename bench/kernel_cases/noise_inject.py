"""noise_inject in stage 1 (halves of the encoder's moments, with gradients) and stage 2 (cached mean and std).

Training takes z_t as tokens, of 1 x 1 (f16d32) or 2 x 2 (f8d4) patches; a GPU is also timed without, where every access
is coalesced.

The reference draws its noise as the op does, by Philox in int64 arithmetic, which is slow to run and slow to compile.
The yardstick "torch.randn" is what a training script without stateless noise runs, and what torch.compile is given.
"""

import torch
import torch.nn.functional as F

from bench.kernel_cases.case import KernelCase, dtype_name, random_normal
from sendvae_fast.ops import NoiseInjectOutput, noise_inject, noise_inject_reference, philox

LATENTS = {"f16d32 256px": (32, 16, 16), "f8d4 256px": (4, 32, 32), "2 x 2 x 2": (2, 2, 2)}  # [C, H, W]
PATCH_SIZES = {"f16d32 256px": 1, "f8d4 256px": 2, "2 x 2 x 2": 1}


def cases(device: torch.device) -> list[KernelCase]:
    if device.type != "cpu":
        return [
            case(latent, batch, torch.bfloat16, device, tokens)
            for case, latent, batch in (
                (stage_1, "f16d32 256px", 64),
                (stage_1, "f8d4 256px", 64),
                (stage_2, "f16d32 256px", 256),
            )
            for tokens in (False, True)
        ]
    return [
        stage_1("f16d32 256px", 16, torch.float32, device, True),
        stage_2("f8d4 256px", 32, torch.float32, device, True),
    ]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    return [stage_1("2 x 2 x 2", 1, torch.float32, device, True)]


def stage_1(latent: str, batch: int, dtype: torch.dtype, device: torch.device, tokens: bool) -> KernelCase:
    channels, height, width = LATENTS[latent]
    patch_size = PATCH_SIZES[latent] if tokens else None

    def inputs(number):
        moments = random_normal(
            batch, 2 * channels, height, width, number=number, dtype=dtype, device=device, requires_grad=True
        )
        return moments, *statistics_and_ids(channels, batch, number, device)

    def form(function):
        def call(moments, *rest):
            out = function(*moments.chunk(2, dim=1), *rest, patch_size=patch_size, need_velocity=False)
            return out.z, out.z_t

        return call

    latent_bytes = batch * channels * height * width * dtype.itemsize
    return KernelCase(
        name=f"stage 1, {latent}{' tokens' * tokens}, batch {batch}, {dtype_name(dtype)}",
        inputs=inputs,
        eager=form(noise_inject_reference),
        fused=form(noise_inject),
        to_compile=form(plain),
        yardsticks={"torch.randn": form(plain)},
        forward_bytes=4 * latent_bytes,  # mean, logvar -> z, z_t
        backward_bytes=5 * latent_bytes,  # grad z, grad z_t, logvar -> grad mean, grad logvar
    )


def stage_2(latent: str, batch: int, dtype: torch.dtype, device: torch.device, tokens: bool) -> KernelCase:
    channels, height, width = LATENTS[latent]
    shape = batch, channels, height, width
    patch_size = PATCH_SIZES[latent] if tokens else None

    def inputs(number):
        mean, std = (random_normal(*shape, number=2 * number + i, dtype=dtype, device=device) for i in range(2))
        return mean, std.abs(), *statistics_and_ids(channels, batch, number, device)

    def form(function):
        def call(*tensors):
            out = function(*tensors, spread_is_std=True, patch_size=patch_size, need_z=False)
            return out.z_t, out.velocity

        return call

    return KernelCase(
        name=f"stage 2, {latent}{' tokens' * tokens}, batch {batch}, {dtype_name(dtype)}",
        inputs=inputs,
        eager=form(noise_inject_reference),
        fused=form(noise_inject),
        to_compile=form(plain),
        yardsticks={"torch.randn": form(plain)},
        # mean, std -> z_t, velocity
        forward_bytes=4 * batch * channels * height * width * dtype.itemsize,
    )


def plain(
    mean, spread, latent_mean, latent_std, key, sample_ids,
    *, spread_is_std=False, patch_size=None, need_z=True, need_velocity=True,
):  # fmt: skip
    """The same arithmetic with noise and time from PyTorch's own generator; z comes in any case."""
    std = spread if spread_is_std else torch.exp(0.5 * spread.clamp(-30, 20))
    z = mean + std * torch.randn_like(mean)
    normalised = (z - latent_mean[:, None, None]) / latent_std[:, None, None]
    t = torch.rand(mean.shape[0], device=mean.device)
    level = t[:, None, None, None]
    noise = torch.randn_like(normalised)
    z_t = (1 - level) * normalised + level * noise
    if patch_size is not None:
        z_t = F.pixel_unshuffle(z_t, patch_size).flatten(2).transpose(1, 2).contiguous()
    velocity = (noise - normalised).to(mean.dtype) if need_velocity else mean.new_empty(0)
    return NoiseInjectOutput(z, z_t.to(mean.dtype), velocity, t)


def statistics_and_ids(channels: int, batch: int, number: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """latent_mean, latent_std, key, sample_ids."""
    latent_mean = random_normal(channels, number=number, dtype=torch.float32, device=device)
    ids = torch.arange(batch, device=device) + number * batch
    return latent_mean, torch.full_like(latent_mean, 1.5), philox.make_key(0, number, device), ids
