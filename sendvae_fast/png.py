"""PNG files of this package: written whole or not at all, read by no other of Pillow's plugins.

Some of those run programs.
"""

import os

import numpy as np
from PIL import Image

from sendvae_fast.files import staged_output
from sendvae_fast.reading import open_regular


def write_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write a picture, uint8 [H, W, 3], making its folder. UserError where the disk is full."""
    with staged_output(path) as unfinished:
        Image.fromarray(image).save(unfinished, format="PNG")


def read_png(path: str | os.PathLike[str]) -> np.ndarray:
    """The picture as RGB, uint8 [H, W, 3].

    Raises:
        OSError: the file is missing, no PNG, damaged, or has more pixels than Pillow takes for a picture.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG",)) as image:
            return np.array(image.convert("RGB"))
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's words for damaged chunks
        raise OSError(f"not a sound PNG: {error}") from error


def is_whole_png(path: str | os.PathLike[str]) -> bool:
    """Whether every chunk is there with its checksum, without decoding the picture."""
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG",)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True
