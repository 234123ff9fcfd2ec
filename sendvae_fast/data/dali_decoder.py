"""Decoding batches of JPEGs with NVIDIA DALI: nvJPEG and its hardware decoder on a GPU, libjpeg-turbo on a CPU.

DALI's own readers cannot pass over a bad file, so our sampler reads the bytes. A file that DALI cannot decode breaks
the whole pipeline, so the pipeline is built again and its batch left to Pillow.
"""

import importlib
import logging
import re
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sendvae_fast import ops
from sendvae_fast.engine.streams import SideStream

logger = logging.getLogger(__name__)

MAX_BATCH = 64
"""Pictures that DALI decodes at once."""
MAX_FAILURES = 3
"""Batches in a row that DALI may fail before it is given up."""


def import_dali() -> ModuleType | None:
    """DALI, or None where it is not installed."""
    try:
        import nvidia.dali as dali
    except ImportError:
        return None
    return dali


def what_happened(error: RuntimeError) -> str:
    """What DALI says that happened: after this word, which follows the place in our source."""
    _, found, reason = str(error).partition("encountered:")
    return " ".join((reason if found else str(error)).partition("Current pipeline")[0].split())


def is_a_pictures_fault(error: RuntimeError) -> bool:
    """Whether DALI says that it cannot decode a picture, and not that the GPU or its memory failed."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return False
    return re.search(r"CUDA|cuda|out of memory|Can't allocate|bad_alloc", what_happened(error)) is None


class DaliDecoder:
    """Decodes batches of ordinary RGB JPEGs and crops them with `ops.center_crop`.

    On a CPU the pixels are Pillow's, bit for bit, where both use libjpeg-turbo; a GPU's inverse DCT and chroma
    upsampling differ a little. All other pictures (CMYK, grey, a PNG named as a JPEG ...) are decoded by Pillow: see
    `data.decode`. EXIF orientation is ignored, as the ADM protocol does.
    """

    def __init__(self, size: int, num_threads: int, device: torch.device) -> None:
        """Build the pipeline.

        Args:
            size: side of the crops.
            num_threads: of DALI's own pool.
            device: where to decode and crop; a CUDA device or the CPU.
        """
        self._size, self._num_threads, self._device = size, num_threads, device
        self.stream = SideStream(device)
        """The stream of DALI's results and of the crops."""
        self._pipeline: Any = self._build()
        self._in_use: Any = None
        """The pictures that crops are being cut from."""
        self.num_failures = 0
        """Batches that failed since the last one that did not."""

    @property
    def has_given_up(self) -> bool:
        """Whether too many batches in a row have failed."""
        return self.num_failures >= MAX_FAILURES

    def crops(self, encoded: list[bytes]) -> Tensor | None:
        """The crops of JPEGs, uint8 [n, 3, S, S] on the decoder's device; None when DALI cannot decode one of them.

        On a GPU they are made on `stream`, which may be at work on them still. After a failure the next call works on a
        new pipeline.

        Raises:
            RuntimeError: the GPU failed, or has no memory left: not a matter of the pictures.
        """
        crops = []
        for start in range(0, len(encoded), MAX_BATCH):
            pictures = self._decode(encoded[start : start + MAX_BATCH])
            if pictures is None:
                return None
            with self.stream.active():
                crops.append(ops.center_crops([torch.from_dlpack(picture) for picture in pictures], self._size))
        if encoded:
            self.num_failures = 0
        with self.stream.active():
            return torch.cat(crops) if len(crops) != 1 else crops[0]

    def _decode(self, encoded: list[bytes]) -> Any | None:
        """DALI's list of the pictures, in its memory, which is theirs until the next call; None when it cannot."""
        # The last crops are still to be cut out of the memory that DALI has back in the coming run.
        self.stream.synchronize()
        self._in_use = None
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
            (pictures,) = self._pipeline.run(self.stream.cuda)
        except RuntimeError as error:
            if not is_a_pictures_fault(error):
                raise
            self.num_failures += 1
            after = "Pillow decodes everything from here on" if self.has_given_up else "Pillow decodes this batch"
            logger.warning("DALI failed on a batch of %d pictures (%s): %s", len(encoded), what_happened(error), after)
            self._pipeline = None if self.has_given_up else self._build()
            return None
        self._in_use = pictures
        return pictures

    def _build(self):
        from nvidia.dali import fn, pipeline_def

        types: Any = importlib.import_module("nvidia.dali.types")  # pyright does not know its names
        on_gpu = self._device.type == "cuda"

        @pipeline_def(
            batch_size=MAX_BATCH,
            num_threads=self._num_threads,
            prefetch_queue_depth=1,
            device_id=(self._device.index or 0) if on_gpu else None,  # pyright: ignore[reportArgumentType] - no GPU
        )
        def decode():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(
                encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
            )

        pipeline = decode()
        pipeline.build()
        return pipeline
