"""Decoding batches of JPEGs with NVIDIA DALI: nvJPEG and its hardware decoder on a GPU, libjpeg-turbo on a CPU.

DALI's own readers cannot pass over a bad file, so our sampler reads the bytes. A file that DALI cannot decode breaks
the whole pipeline, so the pipeline is built again and its batch left to Pillow.
"""

import importlib
import logging
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sendvae_fast import ops

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
        self._pipeline: Any = self._build()
        self.num_failures = 0
        """Batches that failed since the last one that did not."""

    @property
    def has_given_up(self) -> bool:
        """Whether too many batches in a row have failed."""
        return self.num_failures >= MAX_FAILURES

    def crops(self, encoded: list[bytes]) -> list[Tensor] | None:
        """The crops of JPEGs, uint8 [3, S, S] each on the decoder's device; None when DALI cannot decode one of them.

        After a failure the next call works on a new pipeline.
        """
        crops = []
        try:
            for start in range(0, len(encoded), MAX_BATCH):
                part = [np.frombuffer(data, np.uint8) for data in encoded[start : start + MAX_BATCH]]
                self._pipeline.feed_input("encoded", part)
                (pictures,) = self._pipeline.run()
                crops += [ops.center_crop(self._tensor(picture), self._size) for picture in pictures]
        except RuntimeError as error:
            self.num_failures += 1
            # DALI reports the place in our source first, and then, after this word, what happened.
            reason = " ".join(str(error).partition("encountered:")[2].partition("Current pipeline")[0].split())
            after = "Pillow decodes everything from here on" if self.has_given_up else "Pillow decodes this batch"
            logger.warning("DALI failed on a batch of %d pictures (%s): %s", len(encoded), reason, after)
            self._pipeline = None if self.has_given_up else self._build()
            return None
        if encoded:
            self.num_failures = 0
        return crops

    def _tensor(self, picture) -> Tensor:
        # Copied, because DALI uses its memory again at the next run.
        if self._device.type == "cuda":
            return torch.from_dlpack(picture).clone()
        return torch.from_numpy(np.array(picture))

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
