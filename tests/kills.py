"""Kills at every point of a piece of work, as seen by the disk."""

import os
from collections.abc import Callable, Collection


def killed_at(event: int, work: Callable[[], object], calls: Collection[str]) -> bool:
    """Fork, run `work`, and exit without any clean-up before the event-th call of one of `os`'s functions `calls`.

    Returns whether it got that far.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def killed_before(call):
            def wrapped(*args, **kwargs):
                nonlocal count
                count += 1
                if count == event:
                    os._exit(9)
                return call(*args, **kwargs)

            return wrapped

        for name in calls:
            setattr(os, name, killed_before(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
