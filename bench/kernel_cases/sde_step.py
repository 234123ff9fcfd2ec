"""sde_step inside the guidance interval, on the channels-last velocity of a SiT with patches of one latent pixel.

The reference draws its noise as the op does, by Philox in int64 arithmetic, which is slow to run and slow to compile.
The yardstick "torch.randn" is what a sampler without stateless noise runs, and what torch.compile is given.
"""

import torch

from bench.kernel_cases.case import KernelCase, dtype_name, random_normal
from sendvae_fast.ops import SdeStepOutput, philox, sde_step, sde_step_reference

SHAPE = 32, 16, 16  # f16d32 at 256 px: [C, H, W]
SCALE = 2.5


def cases(device: torch.device) -> list[KernelCase]:
    if device.type != "cpu":
        return [case(64, torch.float32, device), case(64, torch.bfloat16, device)]
    return [case(16, torch.float32, device)]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    return [case(1, torch.float32, device, "2 x 2 x 2", (2, 2, 2))]


def case(
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    latent: str = "f16d32 256px",
    shape: tuple[int, int, int] = SHAPE,
) -> KernelCase:
    def inputs(number):
        x = random_normal(batch, *shape, number=2 * number, dtype=torch.float64, device=device)
        velocity = random_normal(2 * batch, *shape, number=2 * number + 1, dtype=dtype, device=device)
        times = torch.tensor([0.5, 0.496], dtype=torch.float64, device=device)
        ids = torch.arange(batch, device=device) + number * batch
        key = philox.make_key(0, number, device)
        return x, velocity.contiguous(memory_format=torch.channels_last), times, key, ids

    def form(function):
        return lambda *tensors: tuple(function(*tensors, guidance_scale=SCALE))

    num_elements = batch * torch.Size(shape).numel()
    return KernelCase(
        name=f"guided, {latent}, batch {batch}, {dtype_name(dtype)} velocity, fp64 state",
        inputs=inputs,
        eager=form(sde_step_reference),
        fused=form(sde_step),
        to_compile=form(plain),
        yardsticks={"torch.randn": form(plain)},
        # state and two velocities -> state and network input
        forward_bytes=num_elements * (2 * torch.float64.itemsize + 3 * dtype.itemsize),
    )


def plain(x, velocity, times, key, sample_ids, *, guidance_scale):
    """The same arithmetic with noise from PyTorch's own generator."""
    t, dt = times[0], times[1] - times[0]
    conditional, unconditional = velocity.to(x.dtype).chunk(2)
    v = unconditional + guidance_scale * (conditional - unconditional)
    noise = torch.randn(x.shape, device=x.device)
    x = x + ((2 - t) * v + x) * dt + torch.sqrt(2 * t * dt.abs()) * noise
    return SdeStepOutput(x, x.to(velocity.dtype))
