"""The lock of a run directory: two jobs never write into one run."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sendvae_fast.errors import UserError
from sendvae_fast.reading import read_json

LOCK_FILE = "run.lock"
"""In a run directory: who writes into it, as JSON."""
HEARTBEAT_S = 20.0
"""Seconds between signs of life in the lock file, for file systems without locks."""
STALE_S = 6 * HEARTBEAT_S
"""Seconds without a sign of life after which a lock of another host counts as left by a dead one."""
SETTLE_S = 0.5
"""Where the file system has no locks: seconds after which, of several that found it free at once, the last has it."""

POLL_INTERVAL_S = 1.0
MAX_PROCESS = 2**22
"""The largest process id of Linux."""

_held: dict[Path, IO[str]] = {}
"""Locks of this process. A process is one job: it may take the lock of its own run again."""


def lock_run(directory: Path) -> None:
    """Take the lock of a run directory for this process, until it ends, however it ends.

    It is a POSIX record lock, which the system, or the file server of a dead host, gives up by itself. Where the file
    system has none (Lustre mounted without `flock`), the lock file's age tells: its owner touches it every
    `HEARTBEAT_S` seconds.

    Raises:
        UserError: another process, on this or another host, is writing into the run.
        OSError: the directory cannot be written.
    """
    path = (directory / LOCK_FILE).resolve()
    if path not in _held:
        _lock(path)


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Take the lock of a directory for the length of the block; gives whether it was free.

    The lock is that of `lock_run`: who dies gives it up.

    Raises:
        OSError: the directory cannot be written.
    """
    path = (directory / LOCK_FILE).resolve()
    try:
        _lock(path)
        is_ours = True
    except UserError:
        is_ours = False
    try:
        yield is_ours
    finally:
        if is_ours:
            file = _held.pop(path)
            file.truncate(0)  # where the file system has no locks, this says that nobody is here
            file.close()


@contextmanager
def wait_for_claim(directory: Path) -> Iterator[None]:
    """Hold a folder, which is made, alone for the length of the block; wait while another process has it."""
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        with claimed(directory) as is_ours:
            if is_ours:
                yield
                return
        time.sleep(POLL_INTERVAL_S)


def _lock(path: Path) -> None:
    """Take a lock file until it is closed. UserError where another process has it."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 -- open as long as the lock is held: closing gives it up
    try:
        has_locks = _take(file, path)
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T %Z")}
    json.dump(owner, file)
    file.flush()
    if not has_locks:
        time.sleep(SETTLE_S)
        if _owner(path) != owner:
            file.close()
            raise _refusal(path)
    _held[path] = file
    if not has_locks:
        threading.Thread(target=_beat, args=(path,), name="run lock", daemon=True).start()


def is_locked(directory: Path) -> bool:
    """Whether a job is writing into a run directory, this process or another; nothing is changed."""
    path = (directory / LOCK_FILE).resolve()
    if path in _held:
        return True  # looking at the file would give up this process's own lock
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError:
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:  # the file system has no locks
            return _is_alive(path)
    return False


def _take(file: IO[str], path: Path) -> bool:
    """Lock the file, or see that nobody else has it; returns whether the file system has locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the two that POSIX allows for a lock that somebody has
        raise _refusal(path) from None
    except OSError:  # the file system has no locks
        if _is_alive(path):
            raise _refusal(path) from None
        return False
    return True


def _is_alive(path: Path) -> bool:
    """Whether the owner that the lock file names is there: by its process on this host, by its heartbeat on another."""
    owner = _owner(path)
    if owner.get("host") == socket.gethostname():
        process = owner.get("process")
        return isinstance(process, int) and 0 < process <= MAX_PROCESS and Path(f"/proc/{process}").exists()
    return bool(owner) and time.time() - path.stat().st_mtime < STALE_S


def _owner(path: Path) -> dict:
    try:
        return read_json(path, "it is taken for nobody's")
    except UserError:
        return {}


def _refusal(path: Path) -> UserError:
    owner = _owner(path)
    return UserError(
        f"{path.parent} is in use by process {owner.get('process', '?')} on {owner.get('host', '?')}, since "
        f"{owner.get('since', '?')}: wait for that job to end or stop it, or give another run directory"
    )


def _beat(path: Path) -> None:
    while path in _held:
        time.sleep(HEARTBEAT_S)
        try:
            os.utime(path)
        except OSError:
            return  # the run directory is gone
