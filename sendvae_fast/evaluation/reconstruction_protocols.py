"""The rules by which reconstructions are measured, by name.

| | adm | lightningdit |
|---|---|---|
| picture | ADM centre crop, uint8 | bilinear, antialiased resize of the shorter side, centre crop, floats |
| latent | the posterior's mean | a sample of the posterior |
| PSNR | uint8 | uint8 |
| SSIM | Wang's, on uint8 in [0, 1] | torchmetrics' call with data_range (-1, 1), on floats |
| LPIPS | on the decoder's floats | on the decoder's floats |
| rFID | resizing as in the ADM evaluator | resizing as in pytorch-fid |

`lightningdit` is evaluate_tokenizer.py of hustvl/LightningDiT, the source of VA-VAE's published row; there a short last
batch weighs as a whole one, which 50,000 pictures in batches of 8 do not have. The two are as far apart as rows of the
tokenizer papers' tables.

Shape letters: B batch, S picture size.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torchvision.transforms.functional as transforms
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import decode_rgb
from sendvae_fast.evaluation.inception import Resizing
from sendvae_fast.evaluation.origins import catalog_origin
from sendvae_fast.evaluation.pictures import CatalogPictures, Pictures
from sendvae_fast.evaluation.reconstruction_quality import lightningdit_ssim, ssim
from sendvae_fast.evaluation.result import PicturesOrigin, WeightsOrigin
from sendvae_fast.evaluation.settings import ProtocolName
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.ops import philox
from sendvae_fast.ops.layout import MEMORY_FORMAT


@dataclass(frozen=True)
class Protocol:
    """A set of rules."""

    name: ProtocolName
    samples_posterior: bool
    resizing: Resizing
    """Of Inception's input, for rFID."""
    similarity: Callable[[Tensor, Tensor], Tensor]
    """SSIM of (originals, decoded), float [B, 3, S, S] in and around [-1, 1], per picture."""


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "lightningdit": Protocol("lightningdit", True, "pytorch-fid", lightningdit_ssim),
    "adm": Protocol("adm", False, "adm", lambda x, decoded: ssim(to_uint8(x, "round"), to_uint8(decoded, "round"))),
}


class ResizedPictures(Pictures):
    """A catalog's pictures as LightningDiT's evaluation sees them: float32 in [-1, 1], not rounded.

    The shorter side is resized to `image_size` by torchvision, bilinearly with antialiasing, and the centre cropped.
    """

    def __init__(self, catalog: Catalog, image_size: int, num_threads: int = 4) -> None:
        self.catalog, self.origin = catalog, catalog_origin(catalog, image_size)
        self._num_threads = num_threads

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """float32 [<= batch_size, 3, S, S]."""
        stop, waiting = len(self) if stop is None else stop, deque()
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode") as pool:
            for first in range(start, stop, batch_size):
                ids = range(first, min(first + batch_size, stop))
                waiting.append([pool.submit(self._read, index) for index in ids])
                if len(waiting) > 1:
                    yield torch.stack([future.result() for future in waiting.popleft()])
            for futures in waiting:
                yield torch.stack([future.result() for future in futures])

    def _read(self, index: int) -> Tensor:
        size = self.origin.image_size
        picture = transforms.to_tensor(decode_rgb(self.catalog.read(index), self.catalog.locate(index)))
        return transforms.center_crop(transforms.resize(picture, [size], antialias=True), [size, size]) * 2 - 1


def reconstructed_origin(
    weights: WeightsOrigin, pictures: Pictures, protocol: Protocol, seed: int = 0
) -> PicturesOrigin:
    """Where pictures that an autoencoder made of others come from.

    Args:
        weights: of the autoencoder.
        pictures: the others.
        protocol: that they were made by.
        seed: of the posterior's samples.
    """
    pictures = protocol_pictures(pictures, protocol)
    settings = {"protocol": protocol.name, "seed": seed}
    decisive = f"{weights.sha256} {pictures.identity} {settings}"
    return replace(
        pictures.origin,
        sha256=hashlib.sha256(decisive.encode()).hexdigest(),
        hash_of="settings",
        settings={**settings, "autoencoder": weights.path},
    )


def protocol_pictures(pictures: Pictures, protocol: Protocol) -> Pictures:
    """The same pictures as the protocol resizes and crops them; those of an npz stay as they are."""
    if protocol.name == "lightningdit" and isinstance(pictures, CatalogPictures):
        return ResizedPictures(pictures.catalog, pictures.origin.image_size)
    return pictures


def in_model_range(images: Tensor) -> Tensor:
    """uint8 pictures or floats in [-1, 1], [B, 3, S, S], as floats in [-1, 1], channels last."""
    if images.dtype == torch.uint8:
        return to_model_range(images)
    return images.contiguous(memory_format=MEMORY_FORMAT)


def reconstruct(autoencoder: ImageAutoencoder, x: Tensor, ids: Tensor, protocol: Protocol, seed: int) -> Tensor:
    """What the autoencoder makes of pictures.

    Args:
        autoencoder: in evaluation mode.
        x: [B, 3, S, S] in [-1, 1].
        ids: int64 [B] on x's device, which with `seed` decide the posterior's noise.
        protocol: whether there is noise.
        seed: of the noise.

    Returns:
        float [B, 3, S, S] near [-1, 1], not clamped.
    """
    posterior = autoencoder.posterior(x)
    latents = posterior.mean
    if protocol.samples_posterior:
        key = philox.make_key(seed, 0, x.device)
        noise = philox.normal(key, philox.Stream.POSTERIOR, ids, tuple(latents.shape[1:]))
        latents = latents + posterior.std * noise.to(latents)
    return autoencoder.decode(latents)
