"""Many pictures on one sheet: previews of training, overviews of samples, strips of the demo's report."""

import os

import numpy as np
from torch import Tensor

from sendvae_fast.png import write_png

GRID_GAP_PX = 2


def image_grid(images: Tensor, columns: int) -> np.ndarray:
    """Lay pictures out row by row: uint8 [N, 3, H, W] to uint8 HWC, with a white gap of `GRID_GAP_PX` between them."""
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    gap = GRID_GAP_PX
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for index, picture in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def save_grid(path: str | os.PathLike[str], images: Tensor, columns: int) -> None:
    """Write `image_grid` of uint8 [N, 3, H, W] as a PNG, making its folder."""
    write_png(path, image_grid(images, columns))
