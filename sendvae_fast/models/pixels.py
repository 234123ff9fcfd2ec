"""Pixels as autoencoders want them."""

import torch
from torch import Tensor

MEMORY_FORMAT = torch.channels_last
"""How pictures and feature maps lie in memory, and the weights of convolutions where an engine allows it. A convolution
whose weights lie otherwise than its input converts them at every call."""


def to_model_range(images: Tensor) -> Tensor:
    """uint8 images [B, 3, S, S] as float32 in [-1, 1], channels last.

    The layout of the input is the layout of every activation after it.
    """
    return (images.float() / 127.5 - 1).contiguous(memory_format=MEMORY_FORMAT)
