"""cosine_align on 256 patches of a base (D = 768) and a large (D = 1024) foundation model; its features are frozen."""

import torch
import torch.nn.functional as F

from bench.kernel_cases.case import KernelCase, dtype_name, random_normal
from sendvae_fast.ops import cosine_align

NUM_PATCHES = 256


def cases(device: torch.device) -> list[KernelCase]:
    if device.type != "cpu":
        return [case(128, 768, torch.bfloat16, device), case(128, 1024, torch.bfloat16, device)]
    return [case(8, 768, torch.float32, device), case(8, 1024, torch.bfloat16, device)]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    return [case(1, 8, torch.float32, device, num_patches=1)]


def case(
    batch: int, width: int, dtype: torch.dtype, device: torch.device, num_patches: int = NUM_PATCHES
) -> KernelCase:
    shape = batch, num_patches, width

    def inputs(number):
        features = random_normal(*shape, number=2 * number, dtype=dtype, device=device, requires_grad=True)
        return features, random_normal(*shape, number=2 * number + 1, dtype=dtype, device=device)

    def eager(features, target):
        # As autocast runs it, in float32.
        return 1 - F.cosine_similarity(features.float(), target.float(), dim=-1).mean()

    tensor_bytes = batch * num_patches * width * dtype.itemsize
    return KernelCase(
        name=f"{num_patches} patches, D {width}, batch {batch}, {dtype_name(dtype)}",
        inputs=inputs,
        eager=eager,
        fused=cosine_align,
        forward_bytes=2 * tensor_bytes,  # features, target
        backward_bytes=3 * tensor_bytes,  # features, target -> grad features
    )
