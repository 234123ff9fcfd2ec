"""Pixels as autoencoders want them."""

import torch
from torch import Tensor


def to_model_range(images: Tensor) -> Tensor:
    """uint8 images [B, 3, S, S] as float32 in [-1, 1], channels last.

    The layout of the input is the layout of every activation after it. Weights keep the default layout: ZeRO holds
    them in flat buffers, which know no other.
    """
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
