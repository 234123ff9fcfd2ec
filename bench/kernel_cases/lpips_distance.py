"""lpips_distance on VGG16's first and fourth tap at 256 px; the real picture's features need no gradient."""

import lpips
import torch

from bench.kernel_cases.case import KernelCase, dtype_name, random_normal
from sendvae_fast.ops import lpips_distance

TAPS = {"relu1_2": (64, 256, 256), "relu4_3": (512, 32, 32)}  # [C, H, W] at 256 px


def cases(device: torch.device) -> list[KernelCase]:
    if device.type != "cpu":
        return [tap(name, 32, torch.bfloat16, device) for name in TAPS]
    return [tap("relu1_2", 1, torch.float32, device), tap("relu4_3", 8, torch.float32, device)]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    return [case("4 x 2 x 2", (1, 4, 2, 2), torch.float32, device)]


def tap(name: str, batch: int, dtype: torch.dtype, device: torch.device) -> KernelCase:
    return case(f"VGG16 {name} 256px", (batch, *TAPS[name]), dtype, device)


def case(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> KernelCase:
    def inputs(number):
        f0, f1 = (
            random_normal(*shape, number=2 * number + i, dtype=dtype, device=device)
            .relu().contiguous(memory_format=torch.channels_last)
            for i in range(2)
        )  # fmt: skip
        weight = random_normal(shape[1], number=number, dtype=torch.float32, device=device).abs()
        return f0, f1.requires_grad_(), weight

    def eager(f0, f1, weight):
        # As the lpips package does it, in float32.
        difference = (lpips.normalize_tensor(f0.float()) - lpips.normalize_tensor(f1.float())) ** 2
        head = torch.nn.functional.conv2d(difference, weight[None, :, None, None])
        return lpips.spatial_average(head, keepdim=False).flatten()

    tensor_bytes = torch.Size(shape).numel() * dtype.itemsize
    return KernelCase(
        name=f"{name}, batch {shape[0]}, {dtype_name(dtype)}",
        inputs=inputs,
        eager=eager,
        fused=lpips_distance,
        forward_bytes=2 * tensor_bytes,  # f0, f1
        backward_bytes=3 * tensor_bytes,  # f0, f1 -> grad f1
    )
