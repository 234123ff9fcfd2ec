"""Stage 2's training data: cached latents in the order of the schedule.

With REPA the photographs of the same samples are beside them.

Shape letters: B batch, C latent channels, H W latent size, S image size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.data.latents.latent_rows import LatentReader
from sendvae_fast.data.latents.lightningdit import PublishedLatents
from sendvae_fast.data.order import BatchSchedule
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.models.sit.sizes import NO_REPA, is_sequence
from sendvae_fast.ops import philox
from sendvae_fast.train.settings import ImageDataConfig
from sendvae_fast.train.sit.settings import LatentReaderConfig
from sendvae_fast.train.training_images import TrainingImages, check_global_batch


class LatentBatch(NamedTuple):
    """One rank's share of a step."""

    ids: Tensor  # int64 [B]
    mean: Tensor  # [B, C, H, W]
    std: Tensor  # [B, C, H, W]
    labels: Tensor  # int64 [B]
    images: Tensor | None  # uint8 [B, 3, S, S]


class TrainingLatents:
    """This rank's share of the latents of every step.

    Where the cache has flipped latents too, half of the samples come flipped, with their images, drawn by (seed, step,
    sample id).

    Args:
        directory: a latent cache of `sendvae cache-latents`, or a folder of LightningDiT's published latents.
        data: the photographs, of which only `global_batch` matters without REPA.
        with_images: whether REPA uses the photographs.

    Raises:
        UserError: the latents are missing, damaged or of other images; the global batch does not divide among ranks and
            accumulation steps; images are wanted beside published latents, or beside latents that are no grid.
    """

    def __init__(
        self,
        directory: str,
        data: ImageDataConfig,
        reader: LatentReaderConfig,
        *,
        with_images: bool,
        seed: int,
        accumulation_steps: int,
        distributed: Distributed,
    ) -> None:
        check_global_batch(data, accumulation_steps, distributed)
        self.cache: LatentCache | PublishedLatents
        if PublishedLatents.is_here(Path(directory)):
            self.cache = PublishedLatents.open(directory)
        else:
            self.cache = LatentCache.open(directory, reader.verify_hashes)
        if with_images and is_sequence(self.cache.rows.shape):
            raise UserError(NO_REPA)
        self._images = self._open_images(data, seed, accumulation_steps, distributed) if with_images else None
        self._schedule = BatchSchedule(len(self.cache), data.global_batch, seed)
        self._reader = LatentReader(
            self.cache.rows,
            num_threads=reader.num_threads,
            read_ahead=reader.read_ahead,
            pin_memory=distributed.device.type == "cuda",
        )
        self._seed, self._ranks = seed, distributed

    def _open_images(self, data: ImageDataConfig, *rest: Any) -> TrainingImages:
        if isinstance(self.cache, PublishedLatents):
            raise UserError(
                f"the published latents in {self.cache.directory} do not say which picture each is of, so REPA cannot "
                "look at it: set repa.weight=0, or make latents of your own with `sendvae cache-latents`"
            )
        images = TrainingImages(data, *rest)
        self.cache.check_catalog(images.catalog, data.image_size)
        return images

    @property
    def num_classes(self) -> int:
        """The number of classes in the photographs' folder; without a folder, as many as the labels name."""
        return len(self._images.catalog.class_names) if self._images else int(self.cache.labels.max()) + 1

    def autoencoder(self) -> Path | None:
        """The weights that made the latents, as seen from the working directory; None where they are gone or not known.

        Published latents say nothing of it.
        """
        weights = None if isinstance(self.cache, PublishedLatents) else self.cache.autoencoder
        if weights is None or not weights.exists():
            return None
        return weights.relative_to(Path.cwd()) if weights.is_relative_to(Path.cwd()) else weights

    def facts(self) -> dict[str, str]:
        """The latents, and the pictures beside them, for a run's header."""
        shape = " x ".join(map(str, self.cache.rows.shape))
        own = {"latents": f"{len(self.cache):,} of {shape} in {self.num_classes:,} classes, {self.cache.directory}"}
        return own if self._images is None else {**own, **self._images.facts()}

    def batches(self, start_step: int) -> Iterator[LatentBatch]:
        """Batches from `start_step` on, endless. Their latents hold until the next is asked for (`LatentReader`)."""
        for (mean, *rest), (ids, images) in self._reader.read(self._plan(start_step)):
            std = rest[0] if rest else torch.zeros_like(mean)  # published latents are samples already
            yield LatentBatch(ids, mean, std, self.cache.labels[ids], images)

    def _plan(self, start_step: int) -> Iterator[tuple[Tensor, Tensor | None, tuple[Tensor, Tensor | None]]]:
        """(ids, variants, (ids, images)) of every step; the ids are the images', some of them replaced."""
        batches = self._images.batches(start_step) if self._images else map(self._ids, itertools.count(start_step))
        for step, ids, *rest in batches:
            images = rest[0] if rest else None
            flips = None
            if self.cache.rows.num_variants == 2:
                key = philox.make_key(self._seed, step)
                flips = philox.uniform(key, philox.Stream.FLIP, ids, 1)[:, 0] < 0.5
                if images is not None:
                    mirrored = flips.to(images.device)[:, None, None, None]
                    torch.where(mirrored, images.flip(-1), images, out=images)  # where they lie, which may be pinned
            yield ids, None if flips is None else flips.long(), (ids, images)

    def _ids(self, step: int) -> tuple[int, Tensor]:
        return step, torch.from_numpy(self._schedule.ids(step, self._ranks.rank, self._ranks.world_size))
