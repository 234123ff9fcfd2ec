"""Which samples come when: a pure function of (seed, step, rank, world size)."""

import numpy as np
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.ops import philox


class BatchSchedule:
    """The order in which `num_samples` samples are visited in batches of `global_batch`.

    Each epoch visits the samples in a new order: sorted by one stateless 64-bit random number per (seed, epoch, id).
    The samples left over at the end of an epoch, fewer than a batch, are dropped; which ones changes every epoch.
    The global batch at a step does not depend on the number of ranks; each rank takes a contiguous slice of it.

    Raises:
        UserError: when an epoch would hold not one full batch.
    """

    def __init__(self, num_samples: int, global_batch: int, seed: int) -> None:
        if global_batch < 1:
            raise UserError(f"the global batch size is {global_batch}; give at least 1")
        if num_samples < global_batch:
            raise UserError(
                f"there are {num_samples} samples but the global batch size is {global_batch}; "
                "lower the batch size or add samples"
            )
        self.num_samples, self.global_batch, self.seed = num_samples, global_batch, seed
        self.steps_per_epoch = num_samples // global_batch
        self._permutation: tuple[int, np.ndarray] | None = None  # of the epoch last asked for

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of all samples in `epoch`, int64 [num_samples]."""
        cached = self._permutation
        if cached is None or cached[0] != epoch:
            key = philox.make_key(self.seed, epoch)
            high, low = philox.words(key, philox.Stream.ORDER, torch.arange(self.num_samples), 2).unbind(1)
            cached = epoch, np.argsort((high << 32 | low).numpy(), kind="stable")
            self._permutation = cached
        return cached[1]

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids of `rank` at `step`, int64 [global_batch / world_size].

        Raises:
            UserError: when the global batch does not divide by `world_size`.
        """
        if self.global_batch % world_size:
            raise UserError(
                f"the global batch size {self.global_batch} does not divide by the {world_size} ranks; "
                f"make it a multiple of {world_size}"
            )
        share = self.global_batch // world_size
        start = (step % self.steps_per_epoch) * self.global_batch + rank * share
        return self.permutation(self.epoch(step))[start:start + share].copy()
