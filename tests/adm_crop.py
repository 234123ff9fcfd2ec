"""The ADM crop in plain Pillow and NumPy, written apart from ours."""

import numpy as np
from PIL import Image


def plain_adm_crop(image, size):
    """The protocol of guided-diffusion: halve with boxes while twice the size is left, resize, cut. uint8 [S, S, 3]."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    ratio = size / min(width, height)
    image = image.resize((int(np.rint(width * ratio)), int(np.rint(height * ratio))), resample=Image.BICUBIC)
    x, y = (image.size[0] - size) // 2, (image.size[1] - size) // 2
    return np.array(image.crop((x, y, x + size, y + size)))
