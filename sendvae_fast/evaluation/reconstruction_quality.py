"""The quality of reconstructions beside their originals, picture by picture: PSNR and SSIM.

Shape letters: B batch, H W picture height and width.
"""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from sendvae_fast.errors import UserError

# The cap that RAE's evaluation puts on a PSNR: identical pictures would make any mean infinite.
IDENTICAL_PSNR_DB = 100.0
SSIM_RADIUS_PX = 5


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """20 log10(255 / sqrt(mse)) in dB, per picture: uint8 [B, C, H, W] twice to float64 [B]; infinite if identical."""
    mse = (x.double() - y.double()).square().flatten(1).mean(dim=1)
    return 20 * torch.log10(255 / mse.sqrt())


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Wang's structural similarity per picture: uint8 [B, C, H, W] twice (H, W >= 11) to float64 [B].

    On [0, 1], 11x11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03, mean over the channels and the valid region (where
    the window lies within the picture). The range matters: SSIM's luminance term is not invariant to an offset. Raises
    UserError for pictures smaller than the window.
    """
    _check_size(x)
    # float32: torch has no fast float64 convolution, and the map's rounding is far below what is ever printed.
    x, y = (image.float() / 255 for image in (x, y))
    _, full_map = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
    inside = slice(SSIM_RADIUS_PX, -SSIM_RADIUS_PX)
    return full_map[..., inside, inside].double().flatten(1).mean(dim=1)


def lightningdit_ssim(originals: Tensor, decoded: Tensor) -> Tensor:
    """SSIM per picture as the call of LightningDiT's tokenizer evaluation gives it: float [B, 3, H, W] twice to [B].

    torchmetrics with `data_range=(-1, 1)`: both sides clamped to [-1, 1] and not rounded, the mean over all of the map,
    with pictures mirrored at the border. Raises UserError for pictures smaller than the window.
    """
    _check_size(originals)
    similarity = structural_similarity_index_measure(
        decoded.float(), originals.float(), data_range=(-1.0, 1.0), reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity.double()


def _check_size(images: Tensor) -> None:
    if min(images.shape[-2:]) < 2 * SSIM_RADIUS_PX + 1:
        raise UserError(f"SSIM needs pictures of at least 11x11 pixels, not {images.shape[-1]}x{images.shape[-2]}")
