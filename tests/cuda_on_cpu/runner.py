"""Jobs for worker.py, one after the other in one process that is started with the first."""

import bisect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_on_cpu import build
from sendvae_fast.ops import library as ops_library


@dataclass(frozen=True)
class Stream:
    """What a kernel's warps did with tensors of one size in one direction.

    accesses: of a warp. sectors: of 32 bytes, that each touches. bytes: used of those.
    """

    accesses: int
    sectors: int
    bytes: int


@dataclass(frozen=True)
class Counts:
    """What all launches of a kernel did. barriers: of a block. shuffles, shared_accesses: of a warp.

    bank_conflicts: turns that accesses of shared memory take beyond the first. streams: by the tensors' bytes, and
    whether they are written.
    """

    launches: int
    barriers: int
    shuffles: int
    shared_accesses: int
    bank_conflicts: int
    streams: dict[tuple[int, bool], Stream]


@dataclass(frozen=True)
class Outcome:
    """num_calls: how many were made. failures: a line for each that failed. unused: the kernels that no call ran.

    counts: by kernel, where they were asked for.
    """

    num_calls: int
    failures: list[str]
    unused: list[str]
    counts: dict[str, Counts]


class Runner:
    def __init__(self) -> None:
        environment = {
            **os.environ,
            ops_library.ENVIRONMENT_VARIABLE: str(build.schema_library()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(build.ROOT), str(build.ROOT / "tests"))),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def run(
        self,
        op: str,
        library: Path,
        order: str = "forward",
        cases: Sequence[str] | None = None,
        dtypes: Sequence[str] | None = None,
        raw_calls: bool = True,
        count: bool = False,
        seconds: int = 600,
    ) -> Outcome:
        """Check the op's cases of these names in these dtypes (None: all) and make its raw calls, in so much time.

        count: count what a checked library's kernels do.
        """
        job = dict(op=op, library=str(library), order=order, cases=cases, dtypes=dtypes)
        job |= dict(raw_calls=raw_calls, count=count, seconds=seconds)
        self._process.stdin.write(json.dumps(job) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the worker has ended; its last words are on stderr")
        answer = json.loads(line)
        kernels = build.kernels(library)
        begins = sorted(kernels)

        def kernel_at(address: int) -> str:
            return kernels[begins[bisect.bisect_right(begins, address) - 1]]

        unused = set(kernels.values()) - {kernel_at(address) for address in answer["entered"]}
        counts = {}
        for counted in answer["counts"]:
            streams = {(size, bool(is_write)): Stream(*stream) for size, is_write, *stream in counted.pop("streams")}
            kernel = kernel_at(counted.pop("kernel"))
            counts[kernel] = Counts(**counted, streams=streams)
        return Outcome(answer["calls"], answer["failures"], sorted(unused), counts)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
