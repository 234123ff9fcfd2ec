"""What a process holds while it trains, step by step: memory, Python objects, files, threads."""

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import NamedTuple

PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


class Holdings(NamedTuple):
    """What is held after a step, when garbage has been collected."""

    step: int
    rss_kib: int
    """Resident memory."""
    used_kib: int
    """Handed out by malloc, in all arenas, and not freed: tensors among it."""
    free_kib: int
    """Freed, and kept by malloc for later."""
    blocks: int
    """Memory blocks of Python's own allocator: nearly one for each small object."""
    objects: int
    """Objects that the garbage collector follows."""
    files: int
    """Open descriptors."""
    threads: int


class Mallinfo(ctypes.Structure):
    """What `mallinfo2` of glibc 2.33 returns, over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


_libc = ctypes.CDLL(None)
_libc.mallinfo2.restype = Mallinfo


def look(step: int) -> Holdings:
    """What this process holds now."""
    gc.collect()
    memory = _libc.mallinfo2()
    return Holdings(
        step=step,
        rss_kib=int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_KIB,
        used_kib=(memory.uordblks + memory.hblkhd) // 1024,
        free_kib=memory.fordblks // 1024,
        blocks=sys.getallocatedblocks(),
        objects=len(gc.get_objects()),
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
    )


def give_back_free_memory() -> int:
    """Have malloc return to the system what it has free; resident memory after it, KiB."""
    _libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_KIB


def growth(seen: list[Holdings], name: str) -> float:
    """How much more the last third of the looks holds, at the least, than the third before, per 1,000 steps.

    The least, as futures and threads on their way come and go.
    """
    third = len(seen) // 3
    before, last = seen[-2 * third : -third], seen[-third:]
    steps = last[0].step - before[0].step
    return 1000 * (min(getattr(look, name) for look in last) - min(getattr(look, name) for look in before)) / steps


def table(seen: list[Holdings]) -> str:
    """The looks, a line each, some twenty of them."""
    rows = [Holdings._fields, *seen[:: max(len(seen) // 20, 1)]]
    return "\n".join("  ".join(f"{value:>9}" for value in row) for row in rows)
