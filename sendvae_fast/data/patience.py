"""Reads from a network file system that fails for a while: tried again, because the picture is not to blame."""

import errno
import logging
import time
from collections.abc import Callable

from sendvae_fast.data.decode import UnreadableImage

logger = logging.getLogger(__name__)

PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""Errors of a file server that is away or restarts; EIO is also a bad disk's, which stays."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0
PATIENCE_S = 30.0


def read_patiently(read: Callable[[], bytes], patience_s: float = PATIENCE_S) -> bytes:
    """What `read` returns, tried again where it fails as a file server's absence makes it fail.

    Args:
        read: reads a picture's bytes and raises `UnreadableImage` from the cause.
        patience_s: seconds from the first failure on, after which the last one is raised.

    Raises:
        UnreadableImage: for any other cause at once, or when patience has run out.
    """
    end, wait = None, FIRST_WAIT_S
    while True:
        try:
            return read()
        except UnreadableImage as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in PASSING:
                raise
            if end is None:
                end = time.monotonic() + patience_s
                logger.warning("%s: %s; reading it again for up to %g s", error.path, error.reason, patience_s)
            if time.monotonic() + wait > end:
                raise
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_S)
