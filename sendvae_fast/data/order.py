"""Which samples come when: a pure function of (seed, step, rank, world size)."""

import numpy as np

from sendvae_fast.errors import UserError

ORDER_STREAM = 7
"""`Stream.ORDER` of docs/design.md."""
_MASK_32 = np.uint64(0xFFFFFFFF)


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
            words = random_words(self.seed, epoch, ORDER_STREAM, np.arange(self.num_samples, dtype=np.uint64))
            cached = epoch, np.argsort(words, kind="stable")
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


def random_words(seed: int, step: int, stream: int, sample_ids: np.ndarray) -> np.ndarray:
    """The first two Philox4x32-10 words of element block 0 per sample as one number, uint64 [N].

    Key and counter are as docs/design.md lays down for every random number of the project, with `step` the epoch. NumPy
    integers rather than `ops.philox` tensors: a million samples take a few tenths of a second.
    """
    key = _splitmix64((_splitmix64(seed) + step) % 2**64)
    key_0, key_1 = key & 0xFFFFFFFF, key >> 32
    ids = sample_ids.astype(np.uint64)
    word_0, word_1 = np.zeros_like(ids), np.full_like(ids, stream)
    word_2, word_3 = ids & _MASK_32, ids >> np.uint64(32)
    for _ in range(10):
        product_0, product_1 = np.uint64(0xD2511F53) * word_0, np.uint64(0xCD9E8D57) * word_2
        word_0, word_1, word_2, word_3 = (
            (product_1 >> np.uint64(32)) ^ word_1 ^ np.uint64(key_0),
            product_1 & _MASK_32,
            (product_0 >> np.uint64(32)) ^ word_3 ^ np.uint64(key_1),
            product_0 & _MASK_32,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) & 0xFFFFFFFF, (key_1 + 0xBB67AE85) & 0xFFFFFFFF
    return word_0 << np.uint64(32) | word_1


def _splitmix64(value: int) -> int:
    """One output of the SplitMix64 generator at state `value` (Steele et al., 2014), modulo 2^64."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)
