"""The pictures of a job that cannot be read: which they are, and when they are too many."""

import logging
import threading

import numpy as np

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import UnreadableImage
from sendvae_fast.errors import UserError

logger = logging.getLogger(__name__)

NUM_LISTED = 5
"""At most so many bad files go into one message."""


class BadImages:
    """The unreadable images of a catalog: those that its index knows of, and those met since. Safe to share by threads.

    Args:
        catalog: of all images.
        max_fraction: share of the catalog's images that may be bad.
        setting: the key of a config that `max_fraction` is given by, for the message.

    Raises:
        UserError: when the index already knows of too many.
    """

    def __init__(self, catalog: Catalog, max_fraction: float, setting: str) -> None:
        self._num_images, self._max_fraction, self._setting = len(catalog), max_fraction, setting
        self._lock = threading.Lock()
        self._words: dict[int, str] = {}  # what the message says of each
        verdicts = catalog.verdicts
        if verdicts is not None:
            for sample_id in np.flatnonzero(catalog.is_bad).tolist():
                self._words[sample_id] = f"{catalog.locate(sample_id)} ({verdicts[sample_id].removeprefix('bad: ')})"
        self.check()

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._words

    def note(self, sample_id: int, error: UnreadableImage) -> None:
        """Log an unreadable image once.

        Raises:
            UserError: when there are too many now.
        """
        with self._lock:
            if sample_id in self._words:
                return
            self._words[sample_id] = f"{error.path} ({error.reason})"
            self.check()
        logger.warning("passing over the image %s: %s", error.path, error.reason)

    def check(self) -> None:
        """Raise the `UserError` that stops a job, with the first bad images in its line, when there are too many."""
        words = list(self._words.values())
        if len(words) > self._max_fraction * self._num_images:
            more = f" and {len(words) - NUM_LISTED} more" if len(words) > NUM_LISTED else ""
            raise UserError(
                f"cannot read {len(words)} of {self._num_images} images: {', '.join(words[:NUM_LISTED])}{more}; remove "
                f"or replace them and run the same command again, or raise {self._setting} to pass over them"
            )
