"""Feature matrices that need not fit in memory, handed out block by block.

Shape letters: n pictures, d features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError

BLOCK_NUMBERS = 2**24
"""Numbers in a block of rows: 64 MiB in float32."""


class Rows:
    """Rows of a feature matrix, handed out in order, on a device, block by block.

    Arithmetic is in float64 if the features are, else in float32. Raises UserError where a row is not finite.
    """

    def __init__(
        self, features: np.ndarray | Tensor, device: torch.device | str = "cpu", ids: np.ndarray | None = None
    ) -> None:
        """features: [n, ...], flattened to [n, d]; a memory-mapped array is read block by block. ids: which rows."""
        self.features, self.device = features, torch.device(device)
        self.ids = np.arange(len(features)) if ids is None else ids
        self.dtype = torch.float64 if str(features.dtype).endswith("float64") else torch.float32

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """d."""
        return int(np.prod(self.features.shape[1:]))

    def take(self, ids: np.ndarray) -> Rows:
        """The rows `ids` of these."""
        return Rows(self.features, self.device, self.ids[ids])

    def blocks(self, distributed: Distributed | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(place among these rows, block [<= rows, d]) one after the other; of `distributed`, this rank's share."""
        start, stop = share(len(self), distributed)
        size = max(1, BLOCK_NUMBERS // max(1, self.dim))
        for first in range(start, stop, size):
            place = slice(first, min(first + size, stop))
            block = torch.as_tensor(self.features[self.ids[place]]).to(self.device, self.dtype).flatten(1)
            if not block.isfinite().all():
                raise UserError("features to probe are not finite; the checkpoint that made them is broken")
            yield place, block


def share(num: int, distributed: Distributed | None) -> tuple[int, int]:
    """Start and stop of a rank's share of `num` things, contiguous and as even as can be."""
    rank, ranks = (0, 1) if distributed is None else (distributed.rank, distributed.world_size)
    return num * rank // ranks, num * (rank + 1) // ranks


def noise_rows(like: Rows, seed: int) -> Rows:
    """Standard normal numbers in the place of features: what a probe scores that knows nothing of the pictures."""
    rng = np.random.default_rng(seed)
    return Rows(rng.standard_normal((len(like), like.dim), dtype=np.float32).astype(np.float16), like.device)
