"""Training images from encoded pictures: decoded by Pillow, cropped by `ops.center_crop`."""

import os

import numpy as np
import torch
from PIL import Image

from sendvae_fast import ops
from sendvae_fast.data.decode import decode_rgb


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The ADM centre crop of an RGB image, uint8 [size, size, 3]: what Pillow gives, see `ops.center_crop`."""
    return _crop_planes(image, size).transpose(1, 2, 0)


def read_crop(source: bytes | str | os.PathLike[str], size: int, where: str = "in memory") -> np.ndarray:
    """Decode and crop one picture: uint8 [3, size, size]. Arguments and errors as `decode_rgb`."""
    return _crop_planes(decode_rgb(source, where), size)


def _crop_planes(image: Image.Image, size: int) -> np.ndarray:
    pixels = torch.from_numpy(np.array(image))  # a copy, because a tensor's memory must be writable
    return ops.center_crop(pixels, size).numpy()
