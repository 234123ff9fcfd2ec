"""The training images of a stage: their source, their number per step, and this rank's share of every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.loader import ImageBatch, ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.data.order import BatchSchedule
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.train.run_words import picture_words
from sendvae_fast.train.settings import ImageDataConfig

HOW_IMAGES_ARE_READ = ("data.root", *(f"data.{field.name}" for field in dataclasses.fields(LoaderConfig)))
"""Settings of both stages that decide where and how images are read, not which: they may change when a run resumes."""


def check_global_batch(config: ImageDataConfig, accumulation_steps: int, distributed: Distributed) -> None:
    """Raise a UserError unless the global batch divides among ranks and accumulation steps."""
    if config.global_batch % (distributed.world_size * accumulation_steps):
        raise UserError(
            f"data.global_batch={config.global_batch} must be a multiple of ranks x accumulation steps = "
            f"{distributed.world_size} x {accumulation_steps}"
        )


class TrainingImages:
    """This rank's share of the images of every step.

    Raises:
        UserError: the folder is missing or empty, or the global batch does not divide by ranks x accumulation steps.
    """

    def __init__(self, config: ImageDataConfig, seed: int, accumulation_steps: int, distributed: Distributed) -> None:
        check_global_batch(config, accumulation_steps, distributed)
        if config.root is None:
            raise UserError("data.root is missing: give the photographs to train on, --data.root=FOLDER")
        self.catalog = Catalog.open(config.root)
        self.schedule = BatchSchedule(len(self.catalog), config.global_batch, seed)
        self._loader = ImageLoader(self.catalog, config.image_size, config, distributed.device)
        self._ranks = distributed

    def batches(self, start_step: int) -> Iterator[ImageBatch]:
        """This rank's image batches from `start_step` on, for ever."""
        return self._loader.batches(
            self.schedule, start=start_step, rank=self._ranks.rank, world_size=self._ranks.world_size
        )

    def facts(self) -> dict[str, str]:
        """The pictures and who decodes them, for a run's header."""
        return {"pictures": picture_words(self.catalog), "decoder": self._loader.decoder_words()}

    def spread(self, num: int) -> Tensor:
        """`num` images spread evenly over the catalog, for previews: uint8 [num, 3, S, S]."""
        ids = np.linspace(0, len(self.catalog) - 1, min(num, len(self.catalog)), dtype=np.int64)
        return torch.cat([batch.images for i in ids for batch in self._loader.in_order(1, start=i, stop=i + 1)])
