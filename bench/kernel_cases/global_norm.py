"""global_norm of the gradients that a step of SiT-XL has, beside PyTorch's own."""

import torch

from bench.kernel_cases.adamw_ema import FEW_AND_MANY, parameter_shapes
from bench.kernel_cases.case import KernelCase, dtype_name, random_normal
from sendvae_fast.ops import global_norm


def cases(device: torch.device) -> list[KernelCase]:
    return [case(dtype, device, *parameter_shapes(device)) for dtype in (torch.float32, torch.bfloat16)]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    return [case(torch.float32, device, "4 numbers each", shapes) for shapes in FEW_AND_MANY]


def case(dtype: torch.dtype, device: torch.device, name: str, shapes: list[torch.Size]) -> KernelCase:

    def inputs(number):
        return tuple(
            random_normal(*shape, number=number * len(shapes) + i, dtype=dtype, device=device)
            for i, shape in enumerate(shapes)
        )

    return KernelCase(
        name=f"{name}, {len(shapes)} tensors, {dtype_name(dtype)}",
        inputs=inputs,
        eager=lambda *grads: torch.nn.utils.get_total_norm(grads),
        fused=lambda *grads: global_norm(grads),
        forward_bytes=dtype.itemsize * sum(map(torch.Size.numel, shapes)),
        compiles=False,
    )
