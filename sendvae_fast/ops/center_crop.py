"""The ADM centre crop of pictures, bit-exact to Pillow, as uint8 or as networks take it.

H, W a picture's height and width, S the side of the crop, B pictures.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from sendvae_fast.ops.dispatch import backend_for
from sendvae_fast.ops.registration import register

MAX_SIZE = 2**16 - 1
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CenterCropBatch(NamedTuple):
    """The result of `center_crop_batch`; both are channels-last."""

    pixels: torch.Tensor
    """Crops in [-1, 1], [B, 3, S, S]."""
    normalised: torch.Tensor | None
    """Crops as a foundation model takes them, [B, 3, S, S]; None without mean and std."""


def center_crop(image: torch.Tensor, size: int, flip: bool = False) -> torch.Tensor:
    """The centre crop of one picture, as guided-diffusion (ADM), DiT, SiT and REPA cut it.

        while min(H, W) >= 2 S: halve H and W (rounding down) with a box filter
        bring the short side to S, the long one in proportion, with an antialiased bicubic filter (a = -1/2)
        cut S x S out of the middle, and mirror it left to right with flip

    Small pictures are enlarged. The result is that of Pillow, bit for bit: a resize is a pass over the rows and one
    over the columns, with pixels rounded to 8 bits in between and weights in fixed point with 22 binary digits. Pillow
    goes over the rows first; from version 13 on, like this op, it goes over the columns first where that saves much.
    Only pictures more than twice as tall as wide are such: for them an older Pillow gives other pixels.

    Only what the crop needs is read and computed: about 3 min(H, W)^2 bytes of the picture, which the first pass turns
    into half as many or less, and so on. Not differentiable. There is no Triton backend: the passes are sums over bytes
    whose number, order and weights differ from picture to picture and are planned on the host; blocks of a fixed shape
    gain nothing. CUDA takes the plans from the host, too, so it refuses to be captured in a CUDA graph.

    If the forced backend is for another device than the picture's, the backend of the picture's device is used: a run
    forced to cuda still crops on the CPU, where it decodes.

    Args:
        image: uint8 [H, W, 3], H and W from 1 up; packed rows at any stride are read in place, other layouts copied.
        size: S, from 1 to 65535.
        flip: mirror the crop.

    Returns:
        uint8 [3, S, S], contiguous.

    Raises:
        ValueError: another dtype or shape, or a size out of range.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    return center_crops([image], size, [flip])[0]


def center_crops(images: Sequence[torch.Tensor], size: int, flips: Sequence[bool] | None = None) -> torch.Tensor:
    """`center_crop` of pictures of any sizes on one device, in one call: uint8 [B, 3, S, S], contiguous.

    Args:
        images: B pictures as for `center_crop`, at least one.
        size: S, from 1 to 65535.
        flips: which crops are mirrored, none by default.

    Raises:
        ValueError: no picture, a wrong shape, dtype or device, a size out of range, flips of another length.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    images = list(images)
    flips = [False] * len(images) if flips is None else [bool(flip) for flip in flips]
    _check(images, size)
    if not images:
        raise ValueError("there must be at least one image")
    _check_flips(images, flips)
    backend = backend_for("center_crop", images[0])
    if backend == "reference":
        crops = [center_crop_reference(image, size, flip) for image, flip in zip(images, flips, strict=True)]
        return torch.stack(crops)
    pixels, _ = _op(backend, images, size, flips, torch.uint8, None, None)
    return pixels


def center_crop_batch(
    images: Sequence[torch.Tensor],
    size: int,
    flips: Sequence[bool] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> CenterCropBatch:
    """`center_crop` of pictures of any sizes, straight to what the networks take.

        pixels = crop / 127.5 - 1
        normalised = (crop / 255 - mean) / std, for each channel

    computed in float32 (float64 for dtype float64, the reference's) and rounded to dtype once. Beyond `center_crop`
    memory traffic is that of the outputs. On the CPU pictures are spread over PyTorch's threads, one each.

    Args:
        images: B pictures as for `center_crop`, on one device.
        size: S, from 1 to 65535.
        flips: which crops are mirrored, none by default.
        dtype: float32, bfloat16, float16, or float64 (reference only).
        mean: float32 [3] on the pictures' device, to normalise by; None with `std`.
        std: like `mean`; both or neither.

    Returns:
        `CenterCropBatch`; empty, on the CPU or the device of mean, when there are no pictures.

    Raises:
        ValueError: a wrong shape, dtype or device, a size out of range, flips of another length, one of mean and std.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    images = list(images)
    flips = [False] * len(images) if flips is None else [bool(flip) for flip in flips]
    _check(images, size)
    _check_batch(images, flips, dtype, mean, std)
    backend = backend_for("center_crop", images[0]) if images and dtype != torch.float64 else "reference"
    if backend == "reference":
        return center_crop_batch_reference(images, size, flips, dtype=dtype, mean=mean, std=std)
    pixels, normalised = _op(backend, images, size, flips, dtype, mean, std)
    return CenterCropBatch(pixels, None if mean is None else normalised)


def pillow_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The protocol of `center_crop` in Pillow's own words, for an RGB image."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def center_crop_reference(image: torch.Tensor, size: int, flip: bool = False) -> torch.Tensor:
    """`center_crop` by Pillow, on the CPU wherever the picture is. torch.compile cannot look into it."""
    crop = np.array(pillow_center_crop(Image.fromarray(image.cpu().numpy()), size))  # [S, S, 3]
    planes = torch.from_numpy(crop).permute(2, 0, 1)
    return (planes.flip(-1) if flip else planes).contiguous().to(image.device)


def center_crop_batch_reference(
    images: Sequence[torch.Tensor],
    size: int,
    flips: Sequence[bool],
    *,
    dtype: torch.dtype = torch.float32,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> CenterCropBatch:
    """`center_crop_batch` by Pillow and plain PyTorch."""
    compute = torch.promote_types(dtype, torch.float32)
    device = "cpu" if mean is None else mean.device
    crops = [center_crop_reference(image, size, flip) for image, flip in zip(images, flips, strict=True)]
    values = (torch.stack(crops) if crops else torch.empty(0, 3, size, size, device=device)).to(compute)

    def finish(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    if mean is None or std is None:
        return CenterCropBatch(finish(values / 127.5 - 1), None)
    offset, scale = (x.to(compute)[:, None, None] for x in (mean, std))  # [3, 1, 1]
    return CenterCropBatch(finish(values / 127.5 - 1), finish((values / 255 - offset) / scale))


def _check(images: Sequence[torch.Tensor], size: int) -> None:
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be from 1 to {MAX_SIZE}, got {size}")
    for image in images:
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"an image must be uint8 [H, W, 3] with H and W at least 1, got {image.dtype} {list(image.shape)}"
            )
        if image.device != images[0].device:
            raise ValueError(f"images on {images[0].device} and {image.device}: put all on one device")


def _check_flips(images: Sequence[torch.Tensor], flips: Sequence[bool]) -> None:
    if len(flips) != len(images):
        raise ValueError(f"flips must have one entry per image, got {len(flips)} for {len(images)} images")


def _check_batch(
    images: Sequence[torch.Tensor],
    flips: Sequence[bool],
    dtype: torch.dtype,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
) -> None:
    _check_flips(images, flips)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither")
    for name, tensor in (("mean", mean), ("std", std)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != (3,):
            raise ValueError(f"{name} must be float32 [3], got {tensor.dtype} {list(tensor.shape)}")
        if images and tensor.device != images[0].device:
            raise ValueError(f"{name} is on {tensor.device}, the images on {images[0].device}: put all on one device")


def _fake(images, size, flips, dtype, mean, std):
    layout = torch.contiguous_format if dtype == torch.uint8 else torch.channels_last
    shape, device = (len(images), 3, size, size), images[0].device
    pixels = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
    return pixels, torch.empty_like(pixels) if mean is not None else pixels.new_empty(0)


_op = register("center_crop", fake=_fake)
