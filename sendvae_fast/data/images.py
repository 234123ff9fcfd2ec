"""How one image is read: decoding and the ADM centre crop, both with Pillow, the truth for every other path."""

import os

import numpy as np
from PIL import Image

from sendvae_fast.errors import UserError


class UnreadableImage(UserError):
    """An image file that cannot be decoded; `path` and `reason` are kept for lists of them."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"cannot read the image {path}: {reason}; remove or replace it and run the same command again, "
            "or raise data.max_bad_fraction to pass over unreadable images"
        )
        self.path, self.reason = path, reason


def decode_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file of any format and mode Pillow knows to RGB.

    EXIF orientation is ignored, as the ADM protocol does; of an animation the first frame counts.

    Raises:
        UnreadableImage: when the file is missing, broken, truncated, not an image, or absurdly large.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly every type for a broken file, SyntaxError included
        raise UnreadableImage(os.fspath(path), _reason(error)) from error


def check_header(path: str | os.PathLike[str]) -> UnreadableImage | None:
    """Say what is wrong with a file whose header is no image's, without decoding its pixels; None when all is well."""
    try:
        with Image.open(path):
            return None
    except Exception as error:  # as in `decode_rgb`
        return UnreadableImage(os.fspath(path), _reason(error))


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


def read_crop(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """Decode and crop one file: uint8 [3, size, size].

    Raises:
        UnreadableImage: as `decode_rgb`.
    """
    return np.ascontiguousarray(center_crop(decode_rgb(path), size).transpose(2, 0, 1))


def _reason(error: Exception) -> str:
    """One line for the message: Pillow's own words, without the path that they may repeat."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
