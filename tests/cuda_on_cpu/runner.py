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
class Outcome:
    """num_calls: how many were made. failures: a line for each that failed. unused: the kernels that no call ran."""

    num_calls: int
    failures: list[str]
    unused: list[str]


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
        seconds: int = 600,
    ) -> Outcome:
        """Check the op's cases of these names in these dtypes (None: all) and make its raw calls, in so much time."""
        job = dict(op=op, library=str(library), order=order, cases=cases, dtypes=dtypes)
        job |= dict(raw_calls=raw_calls, seconds=seconds)
        self._process.stdin.write(json.dumps(job) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the worker has ended; its last words are on stderr")
        answer = json.loads(line)
        kernels = build.kernels(library)
        begins = sorted(kernels)
        used = {kernels[begins[bisect.bisect_right(begins, address) - 1]] for address in answer["entered"]}
        return Outcome(answer["calls"], answer["failures"], sorted(set(kernels.values()) - used))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
