"""Conversion of pixels to the range of autoencoders, and back."""

from typing import Literal

import torch
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.ops.layout import MEMORY_FORMAT

Rounding = Literal["truncate", "round"]


def to_model_range(images: Tensor) -> Tensor:
    """uint8 images [B, 3, S, S] as float32 in [-1, 1], channels last.

    The layout of the input is the layout of every activation after it.
    """
    return (images.float() / 127.5 - 1).contiguous(memory_format=MEMORY_FORMAT)


def to_uint8(x: Tensor, rounding: Rounding = "truncate") -> Tensor:
    """Pictures in [-1, 1], clamped, to uint8 of the same shape.

    `truncate`: floor(255 (x + 1) / 2), as REPA and REPA-E write; `round`: floor(127.5 x + 128), half up, as SiT, DiT
    and LightningDiT write. They differ by half a grey level on average, which FID sees.
    """
    if rounding not in ("truncate", "round"):
        raise UserError(f"rounding is {rounding!r}; give truncate or round")
    x = x.float()
    levels = 255 * (x + 1) / 2 if rounding == "truncate" else 127.5 * x + 128
    return levels.clamp(0, 255).to(torch.uint8)
