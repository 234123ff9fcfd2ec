"""The quality of reconstructions beside their originals: PSNR, SSIM and a perceptual distance.

Protocol: originals and clamped reconstructions as uint8; PSNR and SSIM of each picture, then the mean over pictures.
LPIPS on the decoder's output before clamping. This is the protocol of LightningDiT's tokenizer evaluation, the source
of the published VA-VAE row, but for SSIM: there it sees the unrounded floats and weighs a short last batch as a whole
one, and torchmetrics 1.5 and later would also average over the border.

Shape letters: B batch, H W picture height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.models.pixels import Rounding, to_uint8

# The cap that RAE's evaluation puts on a PSNR: identical pictures would make any mean infinite.
IDENTICAL_PSNR_DB = 100.0
SSIM_RADIUS_PX = 5


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """20 log10(255 / sqrt(mse)) in dB, per picture: uint8 [B, C, H, W] twice to float64 [B]; infinite if identical."""
    mse = (x.double() - y.double()).square().flatten(1).mean(dim=1)
    return 20 * torch.log10(255 / mse.sqrt())


def ssim(x: Tensor, y: Tensor, pixel_range: Literal["symmetric", "unit"] = "symmetric") -> Tensor:
    """Structural similarity per picture: uint8 [B, C, H, W] twice (H, W >= 11) to float64 [B].

    11x11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03, mean over the channels and the valid region (where the window
    lies within the picture).
    pixel_range: what pixels are mapped to first, which matters as SSIM's luminance term is not invariant to an
    offset. `symmetric`, [-1, 1], is LightningDiT's and gives the tokenizer papers' numbers; `unit`, [0, 1], is Wang's
    definition. Raises UserError for pictures smaller than the window.
    """
    if min(x.shape[-2:]) < 2 * SSIM_RADIUS_PX + 1:
        raise UserError(f"SSIM needs pictures of at least 11x11 pixels, not {x.shape[-1]}x{x.shape[-2]}")
    offset, data_range = (1.0, 2.0) if pixel_range == "symmetric" else (0.0, 1.0)
    # float32: torch has no fast float64 convolution, and the map's rounding is far below what is ever printed.
    x, y = (image.float() * (data_range / 255) - offset for image in (x, y))
    _, full_map = structural_similarity_index_measure(x, y, data_range=data_range, return_full_image=True)
    inside = slice(SSIM_RADIUS_PX, -SSIM_RADIUS_PX)
    return full_map[..., inside, inside].double().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class ReconstructionQuality:
    """Means over `num_images` pictures."""

    psnr: float
    """dB; identical pictures count as `IDENTICAL_PSNR_DB`."""
    ssim: float
    lpips: float | None
    """None where no perceptual distance was given."""
    num_images: int
    num_identical: int


class ReconstructionMeter:
    """Accumulates the metrics over batches, and over ranks.

    distance: (x, y float [B, 3, H, W] in [-1, 1], y unclamped) -> [B], a `losses.perceptual.Perceptual`, say.
    rounding: as in `models.pixels.to_uint8`.
    """

    def __init__(
        self, distance: Callable[[Tensor, Tensor], Tensor] | None = None, rounding: Rounding = "round"
    ) -> None:
        self.distance = distance
        self.rounding: Rounding = rounding
        self._totals = torch.zeros(5, dtype=torch.float64)  # images, identical ones, psnr, ssim, lpips

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """images uint8 [B, 3, H, W]; reconstructions float [B, 3, H, W], the decoder's output."""
        rounded = to_uint8(reconstructions, self.rounding)
        decibels = psnr(images, rounded)
        values = [
            torch.ones_like(decibels),
            decibels.isinf().double(),
            decibels.clamp(max=IDENTICAL_PSNR_DB),
            ssim(images, rounded),
        ]
        if self.distance is not None:
            values.append(self.distance(images.float() / 127.5 - 1, reconstructions.float()).flatten().double())
        sums = torch.stack(values).sum(dim=1).cpu()
        self._totals[: len(sums)] += sums

    def all_reduce(self, distributed: Distributed) -> None:
        """Add up over ranks; call it once, on every rank, before `result`."""
        distributed.all_reduce_sum(self._totals)

    def result(self) -> ReconstructionQuality:
        """The means so far. Raises UserError if there was no picture."""
        num_images = int(self._totals[0])
        if num_images == 0:
            raise UserError("no picture was reconstructed, so there is nothing to measure; is the data folder empty?")
        _, _, mean_psnr, mean_ssim, mean_lpips = (self._totals / num_images).tolist()
        return ReconstructionQuality(
            psnr=mean_psnr,
            ssim=mean_ssim,
            lpips=None if self.distance is None else mean_lpips,
            num_images=num_images,
            num_identical=int(self._totals[1]),
        )
