"""The ADM centre crop with Pillow, the truth for every other path."""

import os

import numpy as np
from PIL import Image

from sendvae_fast.data.decode import decode_rgb


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The ADM centre crop (guided-diffusion, used by DiT, SiT, REPA): uint8 [size, size, 3] of an RGB image.

    The image is halved with a box filter while its short side is at least twice `size`, brought to a short side of
    `size` with Pillow's antialiased bicubic filter, and cropped in the middle. Small images are enlarged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def read_crop(source: bytes | str | os.PathLike[str], size: int, where: str = "in memory") -> np.ndarray:
    """Decode and crop one picture: uint8 [3, size, size]. Arguments and errors as `decode_rgb`."""
    return np.ascontiguousarray(center_crop(decode_rgb(source, where), size).transpose(2, 0, 1))
