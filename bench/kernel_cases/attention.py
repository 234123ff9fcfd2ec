"""attention at the shapes of SiT-XL, the mapper and the VAE's mid block; the libraries that run here are yardsticks.

It is bound by arithmetic, not by memory: its bytes per second say little.
"""

import torch
import torch.nn.functional as F

from bench.kernel_cases.case import KernelCase, Work, dtype_name, random_normal
from sendvae_fast.errors import UserError
from sendvae_fast.ops import attention, attention_reference, available_attention, use_attention


def cases(device: torch.device) -> list[KernelCase]:
    if device.type != "cpu":
        return [
            case("SiT-XL", 128, 16, 256, 72, torch.bfloat16, device),
            case("mapper, D 768", 128, 12, 256, 64, torch.bfloat16, device),
            case("VAE f16 mid block", 32, 1, 256, 512, torch.bfloat16, device),
            case("VAE f8 mid block", 32, 1, 1024, 512, torch.bfloat16, device),
        ]
    return [
        case("SiT-XL", 2, 16, 256, 72, torch.float32, device),
        case("VAE f8 mid block", 2, 1, 1024, 512, torch.float32, device),
    ]


def case(
    name: str, batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> KernelCase:
    shape = batch, heads, tokens, head_dim

    def inputs(number):
        return tuple(
            random_normal(*shape, number=3 * number + i, dtype=dtype, device=device, requires_grad=True)
            for i in range(3)
        )

    tensor_bytes = torch.Size(shape).numel() * dtype.itemsize
    return KernelCase(
        name=f"{name}, {tokens} tokens, {heads} x {head_dim}, batch {batch}, {dtype_name(dtype)}",
        inputs=inputs,
        eager=attention_reference,
        fused=attention,
        forward_bytes=4 * tensor_bytes,  # q, k, v -> output
        backward_bytes=8 * tensor_bytes,  # q, k, v, output and its gradient -> gradients of q, k, v
        yardsticks={"torch SDPA": F.scaled_dot_product_attention, **libraries(inputs, device)},
    )


def libraries(inputs: Work, device: torch.device) -> dict[str, Work]:
    """Each library that runs here and takes these inputs."""

    def by(name):
        def call(q, k, v):
            with use_attention(name):
                return attention(q, k, v)

        return call

    found = {}
    for name in (name for name, reason in available_attention(device).items() if reason is None):
        try:
            by(name)(*inputs(0))
        except UserError:
            continue
        found[name] = by(name)
    return found
