"""Time every fused op against plain PyTorch, torch.compile of it, and a copy of the same bytes.

Each op is measured in a process of its own, so that a crash or a hang costs only that op. A row per case and pass goes
into <out>/kernels_<machine>.json, with the machine, the versions and the commit; rows of other ops stay there. How a
case is made: `bench/kernel_cases/__init__.py`. With --host the rows are of what a call costs the host
(`bench/host_cost.py`), in one process with one thread, and go into <out>/host_<machine>.json.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from bench.command_line import Parser, positive
from bench.host_cost import QUICK_ROUNDS, ROUNDS, host_rows
from bench.kernel_cases import available_ops, cases_of
from bench.kernel_rows import COPY, EAGER, Effort, one_line, rows_of
from bench.machine import ROOT, last_level_cache_bytes, machine_facts, source_facts, version_facts
from bench.prediction import rows as prediction
from bench.result_file import write_rows
from sendvae_fast.errors import UserError
from sendvae_fast.ops.dispatch import ENVIRONMENT_VARIABLE, OPS

EFFORT = {"cpu": Effort(seconds=1.0), "cuda": Effort(seconds=0.5, op_limit_s=90)}
QUICK = Effort(seconds=0.2, compile=False, graph_replays=3)


def main(arguments: list[str]) -> int:
    """The verb; 1 if a case failed."""
    parser = Parser("kernels", __doc__)
    parser.add_argument("--ops", nargs="+", metavar="OP", help="these ops only, by name")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=positive, help="CPU threads, default: the cores this process may use")
    parser.add_argument("--host", action="store_true", help="CPU time of calls on tensors of a few numbers instead")
    parser.add_argument("--quick", action="store_true", help="few samples, no torch.compile: to try a case")
    parser.add_argument("--out", type=Path, help="folder of the results, default bench/results (--quick: not written)")
    parser.add_argument("--predict", action="store_true", help="count in place of timing, without a GPU: for an H200")
    options = parser.parse_args(arguments)

    if options.predict:
        if options.device or options.threads or options.quick or options.host:
            raise UserError("--predict measures nothing: it goes with --ops and --out alone")
        return predict(options.ops, options.out or ROOT / "bench" / "results")
    if os.environ.get(ENVIRONMENT_VARIABLE):
        raise UserError(f"{ENVIRONMENT_VARIABLE} is set: unset it, every backend is forced in its turn")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    known = list(OPS) if options.host else available_ops()
    ops = options.ops or known
    if unknown := [op for op in ops if op not in known]:
        raise UserError(f"--ops: no cases of {', '.join(unknown)}; there are {', '.join(known)}")
    threads = options.threads or (1 if options.host else len(os.sched_getaffinity(0)))
    effort = QUICK if options.quick else EFFORT[device.type]

    machine = machine_facts(device)
    facts = {"device": device.type, "machine": machine, "threads": threads, "versions": version_facts()}
    facts |= source_facts()
    out = options.out or (None if options.quick else ROOT / "bench" / "results")
    name, source = "kernels", measured_rows(ops, device, threads, effort)
    if options.host:
        torch.set_num_threads(threads)
        rounds = QUICK_ROUNDS if options.quick else ROUNDS
        name, source = "host", (row for op in ops for row in host_rows(op, device, rounds))
    rows = []
    for row in source:
        rows.append({**row, **facts})
        print(summary(row), flush=True)
        if out is not None:  # after each row, so that nothing is lost when this is stopped
            path = write_rows(out, name, machine["name"], rows, itemgetter("op"))
    if out is not None:
        print("written:", path)
    return 1 if any(errors_of(row) for row in rows) else 0


def predict(wanted: list[str] | None, out: Path) -> int:
    """Write what the ops' kernels would take on an H200, as counted on this machine, to a file of its own."""
    known = prediction.predicted_ops()
    if unknown := [op for op in wanted or () if op not in known]:
        raise UserError(f"--predict: no predictions of {', '.join(unknown)}; there are {', '.join(known)}")
    for op in wanted or known:
        found = []
        for row in prediction.predicted_rows(op):
            found.append(row)
            print(prediction.summary(row), flush=True)
        prediction.write(out / prediction.FILE, found)
    print("written:", out / prediction.FILE)
    return 0


def measured_rows(ops: list[str], device: torch.device, threads: int, effort: Effort) -> Iterator[dict[str, Any]]:
    """Rows of every op as they come; an op whose process dies or outlasts its limit ends in a row with the error."""
    context = multiprocessing.get_context("spawn")
    for op in ops:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure_op, args=(op, str(device), threads, effort, sender))
        process.start()
        sender.close()  # so that the end of the process ends the pipe
        deadline = time.monotonic() + effort.op_limit_s
        error = None
        try:
            while receiver.poll(max(0.0, deadline - time.monotonic())):
                yield receiver.recv()
            error = f"not done within {effort.op_limit_s:.0f} s"
        except EOFError:
            process.join()
            if process.exitcode != 0:
                error = f"its process ended with exit code {process.exitcode}"
        finally:
            process.kill()
            process.join()
        if error is not None:
            yield {"op": op, "case": "", "pass": "", "error": error}


def measure_op(op: str, device_name: str, threads: int, effort: Effort, sender: Connection) -> None:
    """In a process of its own: send the rows of one op."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    try:
        cases = cases_of(op, device)
    except Exception as error:
        sender.send({"op": op, "case": "", "pass": "", "error": one_line(error)})
        return
    for case in cases:
        for row in rows_of(op, case, device, last_level_cache_bytes(device), effort):
            sender.send(row)


def errors_of(row: dict[str, Any]) -> list[str]:
    """The errors in a row, a line each."""
    forms = row.get("forms", {})
    return [
        *([row["error"]] if "error" in row else []),
        *(f"{name}: {result['error']}" for name, result in forms.items() if "error" in result),
    ]


def summary(row: dict[str, Any]) -> str:
    """A row for the terminal: medians in microseconds."""
    title = f"{row['op']}, {row['case']}, {row['pass']}"
    forms = {name: result for name, result in row.get("forms", {}).items() if "error" not in result}
    eager = forms.get(EAGER, {}).get("median_us")
    parts = [
        f"{name} {result['median_us']:.0f} us"
        + (f" ({eager / result['median_us']:.2f}x)" if eager and name not in (EAGER, COPY) else "")
        for name, result in forms.items()
    ]
    return "\n  ".join([title, ", ".join(parts), *(f"FAILED {error}" for error in errors_of(row))])
