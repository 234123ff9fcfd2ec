"""adaln between two layers of a block on 256 tokens: SiT-XL (D = 1152), SiT-B (768), with RMSNorm LightningDiT-XL."""

import torch
import torch.nn.functional as F

from bench.kernel_cases.case import KernelCase, dtype_name, random_normal
from sendvae_fast.ops import adaln

NUM_TOKENS = 256


def cases(device: torch.device) -> list[KernelCase]:
    if device.type != "cpu":
        return [
            *(case(128, width, torch.bfloat16, device) for width in (768, 1024, 1152)),
            case(128, 1152, torch.bfloat16, device, rms=True),
        ]
    return [
        case(4, 768, torch.float32, device),
        case(4, 1152, torch.bfloat16, device),
        case(4, 1152, torch.bfloat16, device, rms=True),
    ]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    return [case(1, 8, torch.float32, device, num_tokens=1)]


def case(
    batch: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    num_tokens: int = NUM_TOKENS,
    rms: bool = False,
) -> KernelCase:
    norm = F.rms_norm if rms else F.layer_norm

    def inputs(number):
        shapes = (batch, num_tokens, width), (batch, num_tokens, width), (batch, 6 * width)
        return tuple(
            random_normal(*shape, number=3 * number + i, dtype=dtype, device=device, requires_grad=True)
            for i, shape in enumerate(shapes)
        )

    def eager(x, branch, modulation):
        shift, scale, gate = modulation.unsqueeze(1).chunk(6, dim=2)[:3]
        s = x + gate * branch
        return norm(s, (width,), eps=1e-6) * (1 + scale) + shift, s

    def fused(x, branch, modulation):
        shift, scale, gate = modulation.chunk(6, dim=1)[:3]
        return adaln(x, shift, scale, branch=branch, gate=gate, rms=rms)

    tensor_bytes = batch * num_tokens * width * dtype.itemsize
    return KernelCase(
        name=f"{num_tokens} tokens, D {width}, batch {batch}, {dtype_name(dtype)}{', RMSNorm' if rms else ''}",
        inputs=inputs,
        eager=eager,
        fused=fused,
        forward_bytes=4 * tensor_bytes,  # x, branch -> y, s
        backward_bytes=6 * tensor_bytes,  # grad y, grad s, s, branch -> grad x, grad branch
    )
