"""Images in the order of a schedule, decoded ahead of their use by background threads.

Pillow decodes them, or DALI with Pillow for what DALI cannot do.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.data.bad_images import BadImages
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.crop import read_crop
from sendvae_fast.data.dali_decoder import DaliDecoder, import_dali
from sendvae_fast.data.decode import UnreadableImage, check
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.data.order import BatchSchedule
from sendvae_fast.data.patience import read_patiently
from sendvae_fast.engine.streams import HandOver
from sendvae_fast.errors import UserError


class Prepared(NamedTuple):
    """The pictures of a batch."""

    ids: list[int]
    """Sample ids, of the replacement where an unreadable image was replaced."""
    images: HandOver
    """uint8 [B, 3, S, S]."""


class ImageBatch(NamedTuple):
    """One rank's part of one step."""

    step: int
    ids: Tensor
    """Sample ids, int64 [B]; of the replacement where an unreadable image was replaced."""
    images: Tensor
    """Centre crops, uint8 [B, 3, S, S]; on the loader's device where DALI decodes, else on the CPU (pinned if that
    device is a GPU)."""
    labels: Tensor
    """Class indices, int64 [B]."""


class ImageLoader:
    """Reads the centre crops of a catalog's images, `size` pixels a side.

    What comes out is a function of the catalog, the schedule and the step alone: never of threads, cache or where the
    iteration began (nor of the decoder, as far as DALI's pixels are Pillow's). It may be iterated more than once at the
    same time, as for a preview in the middle of training.

    Args:
        device: where DALI decodes, if it does: batches are then on that device.

    Raises:
        UserError: when the catalog knows of more unreadable images than `max_bad_fraction` allows for, or DALI is asked
            for and cannot work here.
    """

    def __init__(
        self, catalog: Catalog, size: int, config: LoaderConfig | None = None, device: torch.device | None = None
    ) -> None:
        self.catalog, self.size, self.config = catalog, size, config or LoaderConfig()
        self._device = device or torch.device("cpu")
        shape = (len(catalog), 3, size, size)
        fits = np.prod(shape, dtype=np.int64) <= self.config.cache_mb * 2**20
        self._cache = np.empty(shape, np.uint8) if fits else None  # pages are committed only when written
        self._is_cached = np.zeros(len(catalog), bool)
        self._bad = BadImages(catalog, self.config.max_bad_fraction, f"{self.config.section}.max_bad_fraction")
        self._is_for_dali = self._plan_dali()
        self._dali: DaliDecoder | None = None
        self._dali_lock = threading.Lock()  # of the one pipeline, for iterations at the same time

    def decoder_words(self) -> str:
        """Who decodes, and why not DALI where it is left to Pillow without being asked for."""
        if self._is_for_dali is not None:
            return f"DALI for {self._is_for_dali.sum():,} of {len(self.catalog):,} pictures, Pillow for the others"
        if self.config.decoder == "pillow":
            return f"Pillow, as {self.config.section}.decoder says"
        if self._device.type != "cuda":
            return "Pillow (DALI is for GPUs)"
        if self.catalog.facts is None:
            return (
                "Pillow: a plain folder does not say which pictures DALI can decode; `sendvae data index "
                f"{self.catalog.root}` makes a catalog that does"
            )
        return "Pillow: DALI is not installed (pip install nvidia-dali-cuda130)"

    def _plan_dali(self) -> np.ndarray | None:
        """Which samples DALI decodes, bool [num_samples]; None without DALI."""
        decoder, facts = self.config.decoder, self.catalog.facts
        if decoder == "auto":
            decoder = "dali" if self._device.type == "cuda" and facts is not None and import_dali() else "pillow"
        if decoder == "pillow":
            return None
        section = self.config.section
        if import_dali() is None:
            raise UserError(f"{section}.decoder=dali, but DALI is not installed: pip install nvidia-dali-cuda130")
        if facts is None:
            raise UserError(
                f"{section}.decoder=dali needs to know which pictures are ordinary JPEGs: run `sendvae data index "
                f"{self.catalog.root}` and give its catalog in place of the folder"
            )
        formats = np.array(facts["format"].to_pylist(), object)
        return (self.catalog.verdicts == "ok") & (formats == "JPEG")

    def batches(
        self, schedule: BatchSchedule, *, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[ImageBatch]:
        """Batches of `rank` for the steps start .. stop - 1 (without `stop`: for ever).

        Raises:
            UserError: when the schedule is for another number of samples or does not divide among the ranks, or when
                an image cannot be read and `max_bad_fraction` does not allow for it.
        """
        if schedule.num_samples != len(self.catalog):
            raise UserError(
                f"the schedule is for {schedule.num_samples} samples but {self.catalog.root} has {len(self.catalog)} "
                "images; build it from this catalog"
            )
        steps = itertools.count(start) if stop is None else range(start, stop)
        return self._read((step, schedule.ids(step, rank, world_size)) for step in steps)

    def in_order(self, batch_size: int, *, start: int = 0, stop: int | None = None) -> Iterator[ImageBatch]:
        """Samples start .. stop - 1 (default: to the last) once each by id; the last batch may be smaller.

        Raises:
            UserError: when an image cannot be read and `max_bad_fraction` does not allow for it.
        """
        stop = len(self.catalog) if stop is None else stop
        ids = (np.arange(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size))
        return self._read(enumerate(ids))

    def _read(self, plan: Iterable[tuple[int, np.ndarray]]) -> Iterator[ImageBatch]:
        """Walk through (step, ids) pairs with up to `read_ahead` batches in preparation."""
        waiting: deque[tuple[int, Callable[[], Prepared]]] = deque()
        pool = ThreadPoolExecutor(self.config.num_threads, thread_name_prefix="decode")
        dali_thread = ThreadPoolExecutor(1, thread_name_prefix="decode")  # a pipeline does one batch after the other
        try:
            for step, ids in plan:
                waiting.append((step, self._start(ids.tolist(), pool, dali_thread)))
                if len(waiting) > self.config.read_ahead:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())
        finally:
            for executor in (dali_thread, pool):
                executor.shutdown(wait=True, cancel_futures=True)

    def _start(
        self, ids: list[int], pool: ThreadPoolExecutor, dali_thread: ThreadPoolExecutor
    ) -> Callable[[], Prepared]:
        """Begin to prepare the samples `ids`; the function returned waits for them."""
        if self._is_for_dali is None:
            images = self._empty(len(ids))
            futures = [pool.submit(self._put, i, row) for i, row in zip(ids, images, strict=True)]
            return lambda: Prepared([future.result() for future in futures], HandOver(images))
        for_dali = [i for i in ids if self._is_for_dali[i] and not self._is_cached[i]]
        encoded = {i: pool.submit(self._read_for_dali, i) for i in for_dali}
        return dali_thread.submit(self._decode_with_dali, ids, encoded).result

    def _encoded(self, sample_id: int) -> bytes:
        return read_patiently(partial(self.catalog.read, sample_id), self.config.read_retry_s)

    def _read_for_dali(self, sample_id: int) -> bytes:
        """The bytes of a sample; UnreadableImage where they are no longer a JPEG within the limits, as when indexed."""
        data, where = self._encoded(sample_id), self.catalog.locate(sample_id)
        if check(data, where) != "JPEG":
            raise UnreadableImage(where, "no JPEG any more")
        return data

    def _batch(self, step: int, finish: Callable[[], Prepared]) -> ImageBatch:
        prepared = finish()
        ids = torch.tensor(prepared.ids)
        return ImageBatch(step, ids, prepared.images.take(), torch.from_numpy(self.catalog.labels)[ids])

    def _empty(self, num: int) -> Tensor:
        """Memory for crops, uint8 [num, 3, S, S]; pinned for a GPU: the copy there then waits for nothing."""
        shape = (num, 3, self.size, self.size)
        with torch.inference_mode(False):  # the caller's mode; other threads, which fill it, are in none
            return torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _put(self, sample_id: int, row: Tensor) -> int:
        """Put the crop of `sample_id`, or of what replaces it, into `row`; returns whose it is."""
        used, crop = self._sample(sample_id)
        row.copy_(torch.from_numpy(crop))
        return used

    def _decode_with_dali(self, ids: list[int], encoded: dict[int, Future[bytes]]) -> Prepared:
        """The samples `ids`: those in `encoded` by DALI, if it can, the others from the cache or by Pillow."""
        data = {}
        for sample_id, future in encoded.items():
            with suppress(UnreadableImage):  # `_sample` looks again, and decodes or replaces it
                data[sample_id] = future.result()
        with self._dali_lock:
            if self._dali is None:
                self._dali = DaliDecoder(self.size, self.config.num_threads, self._device)
            stream = self._dali.stream
            crops = self._dali.crops(list(data.values())) if data and not self._dali.has_given_up else None
        place = {} if crops is None else {sample_id: place for place, sample_id in enumerate(data)}
        rest = [sample_id for sample_id in dict.fromkeys(ids) if sample_id not in place]
        place |= {sample_id: len(place) + number for number, sample_id in enumerate(rest)}
        with stream.active():
            by_pillow = self._empty(len(rest))
            used = dict(zip(rest, map(self._put, rest, by_pillow), strict=True))
            if crops is None:
                crops = by_pillow.to(self._device, non_blocking=True)
            else:
                if self._cache is not None:
                    for sample_id, crop in zip(data, crops.cpu().numpy(), strict=True):
                        self._keep(sample_id, crop)
                crops = torch.cat([crops, by_pillow.to(self._device, non_blocking=True)]) if rest else crops
            order = [place[sample_id] for sample_id in ids]
            images = crops if order == list(range(len(crops))) else crops[torch.tensor(order).to(self._device)]
        return Prepared([used.get(sample_id, sample_id) for sample_id in ids], stream.hand_over(images))

    def _sample(self, sample_id: int) -> tuple[int, np.ndarray]:
        """The crop of `sample_id`, or of the next readable sample when it cannot be read: (id, uint8 [3, S, S])."""
        while True:
            if self._cache is not None and self._is_cached[sample_id]:
                return sample_id, self._cache[sample_id]
            if sample_id not in self._bad:
                try:
                    data = self._encoded(sample_id)
                    crop = read_crop(data, self.size, self.catalog.locate(sample_id))
                except UnreadableImage as error:
                    self._bad.note(sample_id, error)
                else:
                    self._keep(sample_id, crop)
                    return sample_id, crop
            self._bad.check()  # in every thread: where all are bad, none would ever stop looking
            sample_id = (sample_id + 1) % len(self.catalog)

    def _keep(self, sample_id: int, crop: np.ndarray) -> None:
        if self._cache is not None:
            self._cache[sample_id] = crop
            self._is_cached[sample_id] = True  # only now: another thread may look at any time
