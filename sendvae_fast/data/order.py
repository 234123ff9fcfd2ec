"""The order of samples: a pure function of (seed, epoch, position), whatever the ranks."""

import numpy as np
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.ops import philox


class BatchSchedule:
    """The order in which `num_samples` samples are visited in batches of `global_batch`.

    Each epoch visits every sample exactly once, in a new order: sorted by one stateless 64-bit random number per (seed,
    epoch, id). Epochs follow each other without a gap, so that a batch may hold the end of one and the beginning of the
    next, and no sample is dropped. (With batches of 1024 of ImageNet's 1,281,167 samples the paper's 80 epochs of 1251
    whole batches are 79.99 epochs here.) The global batch at a step does not depend on the number of ranks; each rank
    takes a contiguous slice of it.

    Raises:
        UserError: when there are fewer samples than one batch.
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
        self._permutations: dict[int, np.ndarray] = {}  # by epoch, the last ones used

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of all samples in `epoch`, int64 [num_samples]."""
        if epoch not in self._permutations:
            key = philox.make_key(self.seed, epoch)
            high, low = philox.words(key, philox.Stream.ORDER, torch.arange(self.num_samples), 2).unbind(1)
            # A batch lies in two epochs at most, and steps mostly follow each other.
            self._permutations = {e: order for e, order in self._permutations.items() if abs(e - epoch) == 1}
            self._permutations[epoch] = np.argsort((high << 32 | low).numpy(), kind="stable")
        return self._permutations[epoch]

    def ids(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Sample ids of `rank` at `step` (from 0), int64 [global_batch / world_size].

        Raises:
            UserError: when the global batch does not divide by `world_size`.
        """
        if self.global_batch % world_size:
            raise UserError(
                f"the global batch size {self.global_batch} does not divide by the {world_size} ranks; "
                f"make it a multiple of {world_size}"
            )
        share = self.global_batch // world_size
        epoch, position = divmod(step * self.global_batch + rank * share, self.num_samples)
        ids = self.permutation(epoch)[position : position + share]
        if len(ids) < share:
            ids = np.concatenate([ids, self.permutation(epoch + 1)[: share - len(ids)]])
        return ids.copy()
