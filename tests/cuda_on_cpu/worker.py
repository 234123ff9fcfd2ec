"""Runs cases of tests/op_cases on libraries of CUDA kernels, in a process of its own, for runner.py.

A line of JSON comes in for each job, a line with its outcome goes out. Each job is done by a child process, because a
library cannot be unloaded, and kernels with bugs may bring the process down; what is slow to import is imported once.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from functools import partial
from typing import Any

import pytest
import torch

from sendvae_fast.ops.registration import op_of


def main() -> None:
    torch.set_num_threads(1)
    importlib.import_module("op_cases")  # and with it all that is slow
    importlib.import_module("torch.fx.experimental.symbolic_shapes")  # what autograd imports when it is first called
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed does not belong to the answers
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(run(job)), file=answers)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if status:
            what = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
            print(json.dumps({"calls": 0, "failures": [f"crash: {what}"], "entered": [], "counts": []}), file=answers)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """How many calls were made, a line for each that failed, and the addresses of the kernels that ran."""
    signal.alarm(job["seconds"])
    os.environ["CUDA_ON_CPU_ORDER"] = job["order"]
    torch.ops.load_library(job["library"])
    runtime = ctypes.CDLL(job["library"])
    if job["count"]:
        runtime.cuda_on_cpu_start_counting()
    tests = importlib.import_module(f"op_cases.{job['op']}").TESTS
    cases = [case for case in tests.cases if job["cases"] is None or str(case) in job["cases"]]
    dtypes = [dtype for dtype in tests.dtypes if job["dtypes"] is None or str(dtype) in job["dtypes"]]
    calls = {f"{case} {dtype}": partial(tests.check, case, dtype, "cpu", "cpu") for case in cases for dtype in dtypes}
    if job["raw_calls"]:
        for number, (name, arguments) in enumerate(tests.raw_calls("cpu", "cpu")):
            calls[f"raw call {number} of {name}"] = partial(op_of(name, "cpu"), *arguments)
    failures = []
    for name, call in calls.items():
        try:
            call()
        except pytest.skip.Exception:
            continue
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{name}: {next(iter(str(error).splitlines()), type(error).__name__)}")
    runtime.cuda_on_cpu_counts.restype = ctypes.c_char_p
    counts = json.loads(runtime.cuda_on_cpu_counts())
    return {"calls": len(calls), "failures": failures, "entered": entered(runtime), "counts": counts}


def entered(runtime: ctypes.CDLL) -> list[int]:
    """Addresses in the kernels that this process has run, relative to the library."""
    runtime.cuda_on_cpu_entered.restype = ctypes.c_size_t
    addresses = (ctypes.c_uint64 * 1000)()
    return list(addresses[: runtime.cuda_on_cpu_entered(addresses, ctypes.c_size_t(len(addresses)))])


if __name__ == "__main__":
    main()
