"""Feeds images in the order of a schedule, decoded ahead by background threads."""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import UnreadableImage
from sendvae_fast.data.images import read_crop
from sendvae_fast.data.order import BatchSchedule
from sendvae_fast.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LoaderConfig:
    """How images are read; none of it but `max_bad_fraction` changes what comes out."""

    num_threads: int = 4
    """Threads that decode in the background."""
    read_ahead: int = 4
    """Batches in preparation beyond the one in use."""
    cache_mb: int = 1024
    """Keep all decoded crops in memory when they fit into so many MiB; 0 turns it off."""
    max_bad_fraction: float = 0.0
    """Share of unreadable images passed over (each replaced by the next readable one) before the run stops."""

    def __post_init__(self) -> None:
        for name, least in (("num_threads", 1), ("read_ahead", 0), ("cache_mb", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}, but must be at least {least}")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise UserError(f"data.max_bad_fraction is {self.max_bad_fraction}, but must be in [0, 1)")


class ImageBatch(NamedTuple):
    """One rank's part of one step."""

    step: int
    ids: Tensor
    """Sample ids, int64 [B]; of the replacement where an unreadable image was replaced."""
    images: Tensor
    """Centre crops, uint8 [B, 3, S, S]."""
    labels: Tensor
    """Class indices, int64 [B]."""


class ImageLoader:
    """Reads the centre crops of a catalog's images, `size` pixels a side.

    What comes out is a function of the catalog, the schedule and the step alone: never of threads, cache or where the
    iteration began. Not to be iterated twice at the same time.
    """

    def __init__(self, catalog: Catalog, size: int, config: LoaderConfig | None = None) -> None:
        self.catalog, self.size, self.config = catalog, size, config or LoaderConfig()
        shape = (len(catalog), 3, size, size)
        fits = np.prod(shape, dtype=np.int64) <= self.config.cache_mb * 2**20
        self._cache = np.empty(shape, np.uint8) if fits else None  # pages are committed only when written
        self._is_cached = np.zeros(len(catalog), bool)
        self._bad: dict[int, UnreadableImage] = {}
        self._bad_lock = threading.Lock()

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
        waiting: deque[tuple[int, list[Future[tuple[int, np.ndarray]]]]] = deque()
        pool = ThreadPoolExecutor(self.config.num_threads, thread_name_prefix="decode")
        try:
            for step, ids in plan:
                waiting.append((step, [pool.submit(self._sample, int(i)) for i in ids]))
                if len(waiting) > self.config.read_ahead:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, step: int, samples: "list[Future[tuple[int, np.ndarray]]]") -> ImageBatch:
        ids, images = zip(*(sample.result() for sample in samples), strict=True)
        ids = np.array(ids, np.int64)
        return ImageBatch(
            step, torch.from_numpy(ids), torch.from_numpy(np.stack(images)), torch.from_numpy(self.catalog.labels[ids])
        )

    def _sample(self, sample_id: int) -> tuple[int, np.ndarray]:
        """The crop of `sample_id`, or of the next readable sample when it cannot be read: (id, uint8 [3, S, S])."""
        while True:
            if self._cache is not None and self._is_cached[sample_id]:
                return sample_id, self._cache[sample_id]
            if sample_id not in self._bad:
                try:
                    data = self.catalog.read(sample_id)
                    crop = read_crop(data, self.size, self.catalog.locate(sample_id))
                except UnreadableImage as error:
                    self._note_bad(sample_id, error)
                else:
                    if self._cache is not None:
                        self._cache[sample_id] = crop
                        self._is_cached[sample_id] = True  # only now: another thread may look at any time
                    return sample_id, crop
            sample_id = (sample_id + 1) % len(self.catalog)

    def _note_bad(self, sample_id: int, error: UnreadableImage) -> None:
        """Log an unreadable image once; give up when there are too many."""
        with self._bad_lock:
            if sample_id in self._bad:
                return
            if len(self._bad) + 1 > self.config.max_bad_fraction * len(self.catalog):
                raise error
            self._bad[sample_id] = error
        logger.warning("passing over the image %s: %s", error.path, error.reason)
