"""PyTorch's flight record: the last collectives of each rank, kept in the run's folder where a run no longer moves.

Every backend of `torch.distributed` keeps a ring of its last collectives: which, of what sizes, begun when. Side by
side the records of all ranks show which rank is behind, and in which collective. `record_into` is called before the
process group is made, `write_records` by the watchdog. NCCL writes a record of its own where its own time limit is
passed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch._C import _distributed_c10d as c10d

NUM_KEPT = 2000
"""Collectives that are kept; PyTorch's own number where it keeps any."""
PATIENCE_S = 20
"""Seconds after which the process ends without its record: a GPU that hangs may hold a query for ever."""
STDERR = 2
BACKENDS = ("gloo", "nccl", "nccl2")
"""Names under which PyTorch's versions know them."""
_HAS_NEW_NAMES = hasattr(c10d, "_dump_fr_trace_file")
_NAMES = {
    "number": ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
    "write": ("TORCH_FR_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT"),
    "file": ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
}
"""PyTorch's variables, as they are called now and as they were, of which it now warns."""


def record_into(folder: Path) -> None:
    """Have collectives recorded, and NCCL write its own record into `folder` where its own time limit is passed.

    That one is ``nccl_rank<r>``, for ``python -m torch.distributed.flight_recorder.fr_trace``. The environment is set,
    which the process group reads when it is made; what the user has set there stays.
    """
    values = {"number": str(NUM_KEPT), "write": "1", "file": str(folder.absolute() / "nccl_rank")}
    for what, (new, old) in _NAMES.items():
        if new not in os.environ and old not in os.environ:
            os.environ[new if _HAS_NEW_NAMES else old] = values[what]


def write_records(folder: Path, rank: int) -> list[Path]:
    """Write what each backend has recorded as ``collectives_<backend>_rank<r>.json``; the files.

    Nothing is raised. Where a record does not come within `PATIENCE_S`, the process ends, with its stacks on stderr.
    """
    # By a thread without Python, whose lock may be held.
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=STDERR)
    written = []
    try:
        for backend, record in _records():
            path = folder / f"collectives_{backend}_rank{rank}.json"
            try:
                path.write_bytes(record)
            except OSError as error:
                print(f"warning: cannot write {path} ({error.strerror})", file=sys.stderr, flush=True)
            else:
                written.append(path)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return written


def _records() -> Iterator[tuple[str, bytes]]:
    """(backend, JSON) of every backend that has recorded a collective."""
    for backend in BACKENDS:
        with suppress(AttributeError, TypeError, RuntimeError, ValueError):  # a PyTorch without this function
            record = _record_of(backend)
            if json.loads(record).get("entries"):
                yield backend, record


def _record_of(backend: str) -> bytes:
    """What one backend has recorded."""
    of_nccl = getattr(c10d, "_dump_nccl_trace_json", None)  # where PyTorch has NCCL
    if backend == "nccl" and of_nccl is not None:
        record = of_nccl(includeCollectives=True, onlyActive=False)
        if json.loads(record).get("entries"):
            return record
    dump = c10d._dump_fr_trace_json
    try:
        return dump(includeCollectives=True, onlyActive=False, backend=backend)
    except TypeError:  # PyTorch 2.10: gloo's alone
        return dump(includeCollectives=True, onlyActive=False) if backend == "gloo" else b"{}"
