"""center_crop of photographs of ImageNet's usual size, landscape and upright.

On the CPU both forms start from what Pillow has decoded, as the loader does, so that the op pays for the way into a
tensor. On CUDA the pictures are there already (a decoder on the GPU), and Pillow pays for the way back and forth.
"""

import numpy as np
import torch
from PIL import Image

from bench.kernel_cases.case import KernelCase
from sendvae_fast.ops import (
    center_crop,
    center_crop_batch,
    center_crop_batch_reference,
    center_crop_reference,
    pillow_center_crop,
)

SHAPES = ((375, 500), (500, 375))  # height, width
SHORT_SIDE = 375


def cases(device: torch.device) -> list[KernelCase]:
    if device.type != "cpu":
        return [network_inputs(256, 64, device)]
    return [loader_crops(256, 4), loader_crops(64, 4)]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    picture = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).to(device)
    return [
        KernelCase(
            name="8 x 8 to 4 x 4, uint8",
            inputs=lambda number: (picture,),
            eager=lambda image: center_crop_reference(image, 4),
            fused=lambda image: center_crop(image, 4),
            forward_bytes=picture.numel() + 3 * 4 * 4,
            compiles=False,
            tolerance=0.0,
        )
    ]


def loader_crops(size: int, count: int) -> KernelCase:
    """Decoded images to uint8 crops, one by one."""

    def pillow(*images):
        return tuple(
            torch.from_numpy(np.asarray(pillow_center_crop(image, size)).transpose(2, 0, 1).copy()) for image in images
        )

    def fused(*images):
        return tuple(center_crop(torch.from_numpy(np.array(image)), size) for image in images)

    return KernelCase(
        name=f"{count} photographs to {size}px, uint8",
        inputs=lambda number: tuple(Image.fromarray(picture.numpy()) for picture in pictures(count, number)),
        eager=pillow,
        fused=fused,
        forward_bytes=count * 3 * (SHORT_SIDE**2 + size**2),
        compiles=False,
        tolerance=0.0,
    )


def network_inputs(size: int, count: int, device: torch.device) -> KernelCase:
    """Pictures on the device to the inputs of an autoencoder and of a foundation model."""
    flips = [bool(i % 2) for i in range(count)]

    def form(function):
        def call(mean, std, *images):
            return tuple(function(images, size, flips, dtype=torch.bfloat16, mean=mean, std=std))

        return call

    def inputs(number):
        statistics = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
        return *statistics, *(picture.to(device) for picture in pictures(count, number))

    return KernelCase(
        name=f"{count} photographs to {size}px, bf16 pixels and normalised",
        inputs=inputs,
        eager=form(center_crop_batch_reference),
        fused=form(center_crop_batch),
        forward_bytes=count * 3 * (SHORT_SIDE**2 + 2 * size**2 * torch.bfloat16.itemsize),
        compiles=False,
    )


def pictures(count: int, number: int) -> list[torch.Tensor]:
    """uint8 [H, W, 3]; the time does not depend on what is on them."""
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randint(0, 256, (*SHAPES[i % len(SHAPES)], 3), dtype=torch.uint8, generator=generator)
        for i in range(count)
    ]
