"""group_norm_silu at the maps of VA-VAE's autoencoder (f16d32 at 256 pixels) and of the demo's, channels-last."""

import torch
import torch.nn.functional as F

from bench.kernel_cases.case import KernelCase, dtype_name, random_normal
from sendvae_fast.ops import group_norm_silu

CACHED_BYTES = 32 * 2**20
"""A map up to here is still in an H200's L2 cache when it is read again."""


def cases(device: torch.device) -> list[KernelCase]:
    if device.type != "cpu":
        return [
            case((64, 128, 256, 256), 32, torch.bfloat16, device),
            case((64, 512, 16, 16), 32, torch.bfloat16, device),
            case((1, 128, 256, 256), 32, torch.bfloat16, device),
            case((64, 256, 64, 64), 32, torch.bfloat16, device, with_residual=True),
        ]
    return [case((2, 128, 64, 64), 32, torch.float32, device), case((12, 8, 64, 64), 2, torch.float32, device)]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    return [case((1, 4, 2, 2), 2, torch.float32, device, with_residual) for with_residual in (False, True)]


def case(
    shape: tuple[int, int, int, int],
    num_groups: int,
    dtype: torch.dtype,
    device: torch.device,
    with_residual: bool = False,
) -> KernelCase:
    batch, channels, height, width = shape

    def inputs(number):
        maps = [
            random_normal(*shape, number=4 * number + i, dtype=dtype, device=device)
            .to(memory_format=torch.channels_last)
            .requires_grad_()
            for i in range(2 if with_residual else 1)
        ]
        parameters = [
            random_normal(channels, number=4 * number + i, dtype=dtype, device=device, requires_grad=True)
            for i in (2, 3)
        ]
        return *maps, *parameters

    def eager(x, *rest):
        *residual, weight, bias = rest
        s = x + residual[0] if residual else x
        y = F.silu(F.group_norm(s, num_groups, weight, bias, 1e-6))
        return (y, s) if residual else y

    def fused(x, *rest):
        *residual, weight, bias = rest
        return group_norm_silu(x, weight, bias, num_groups, residual=residual[0] if residual else None)

    map_bytes = batch * channels * height * width * dtype.itemsize
    # A map is read for its statistics and once more for the rest: from memory again, if no cache keeps it.
    again = device.type == "cpu" or map_bytes > CACHED_BYTES
    form = ", with residual" if with_residual else ""
    return KernelCase(
        name=f"{channels} x {height} x {width}, {num_groups} groups, batch {batch}, {dtype_name(dtype)}{form}",
        inputs=inputs,
        eager=eager,
        fused=fused,
        nchw=True,
        # x -> y, or x, residual -> y, s; then s, grad y -> grad x, and grad s.
        forward_bytes=((4 if with_residual else 2) + again) * map_bytes,
        backward_bytes=((4 if with_residual else 3) + 2 * again) * map_bytes,
    )
