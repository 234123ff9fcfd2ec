"""Pixels as autoencoders want them."""

from torch import Tensor

from sendvae_fast.ops.layout import MEMORY_FORMAT


def to_model_range(images: Tensor) -> Tensor:
    """uint8 images [B, 3, S, S] as float32 in [-1, 1], channels last.

    The layout of the input is the layout of every activation after it.
    """
    return (images.float() / 127.5 - 1).contiguous(memory_format=MEMORY_FORMAT)
