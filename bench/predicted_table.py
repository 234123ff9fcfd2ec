"""The tables of what the CUDA kernels should take on an H200, beside what they took where one has been measured."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.goals import GOALS
from bench.kernel_rows import COPY, FORWARD
from bench.markdown import duration, line, percent
from bench.prediction import h200
from bench.prediction.rows import FILE

BEGIN = "<!-- predictions, made by `python -m bench table`: begin -->"
END = "<!-- predictions, made by `python -m bench table`: end -->"
GPU = "H200"
KERNEL_HEADS = (
    "op", "kernel", "predicted", "memory", "issue", "load-store", "latency", "registers", "spills", "occupancy",
    "warp instructions", "from memory", "from L2", "sectors", "used of them", "bank conflicts",
)  # fmt: skip


def predicted_tables(results: Path) -> str:
    """A table of all cases, and one of the kernels of each op's first case; empty without predictions."""
    path = results / FILE
    if not path.exists():
        return ""
    rows, measured = json.loads(path.read_text()), measured_times(results)
    lines = [f"- predicted, not measured: {source}" for source in sorted({source_of(row) for row in rows})]
    heads = ["op", "case", "pass", "predicted", "a copy", "of copy", "goal", "PyTorch's own kernels in it"]
    if measured:
        heads += ["measured", "model's error"]
    lines += ["", line(heads), line(["---"] * len(heads)), *(line(case_cells(row, measured)) for row in rows), ""]
    lines += [line(KERNEL_HEADS), line(["---"] * len(KERNEL_HEADS))]
    lines += [line(cells) for row in longest_passes(rows) for cells in kernel_cells(row)]
    return "\n".join([*lines, ""])


def source_of(row: dict[str, Any]) -> str:
    """The commit that a row is of, and whether it is all of it."""
    tree = {True: "", False: " with uncommitted changes", None: " (tree not checked)"}[row["clean"]]
    return f"commit {(row['commit'] or 'unknown')[:10]}{tree}, {row['date']}"


def measured_times(results: Path) -> dict[tuple[str, str, str], float]:
    """Microseconds of the CUDA kernels by op, case and pass, from results of an H200, within a CUDA graph."""
    found = {}
    for path in sorted(results.glob("kernels_*.json")):
        for row in json.loads(path.read_text()):
            timing = row.get("forms", {}).get("cuda", {}).get("graph")
            if timing is not None and GPU in row["machine"]["name"]:
                found[row["op"], row["case"], row["pass"]] = timing["median_us"]
    return found


def case_cells(row: dict[str, Any], measured: dict[tuple[str, str, str], float]) -> Iterable[str]:
    """One case and pass; with measurements of an H200, the error of the prediction."""
    others = ", ".join(f"{other['name']} {duration(other['us'])}" for other in row["others"])
    goals = [goal for goal in GOALS.get((row["op"], "cuda"), ()) if goal.against == COPY and goal.is_for(row)]
    cells = [row["op"], row["case"], row["pass"].replace("+", " + "), duration(row["us"]), duration(row["copy_us"])]
    cells += [percent(row["of_copy"]), percent(goals[0].at_least) if goals else "", others]
    if measured:
        time = measured.get((row["op"], row["case"], row["pass"]))
        cells += ["", ""] if time is None else [duration(time), f"{row['us'] / time - 1:+.0%}"]
    return cells


def longest_passes(rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Of each op's first case the last pass, which has the kernels of the ones before."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        kept = first.setdefault(row["op"], row)
        if row["case"] == kept["case"] and row["pass"] != FORWARD:
            first[row["op"]] = row
    return first.values()


def kernel_cells(row: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """A line for each kernel of a case: its time, what each bound alone would take, and what was counted."""
    for kernel in row["kernels"]:
        warps = kernel["blocks"] * -(-kernel["threads"] // h200.WARP)
        bounds = (duration(kernel[f"{name}_us"]) for name in ("memory", "issue", "load_store", "latency"))
        yield (
            row["op"], f"`{kernel['name']}`", duration(kernel["us"]), *bounds, str(kernel["registers"]),
            f"{kernel['spill_bytes']} B", percent(kernel["occupancy"]), f"{kernel['instructions'] / warps:,.0f}",
            megabytes(kernel["memory_bytes"]), megabytes(kernel["l2_bytes"]), megabytes(kernel["sector_bytes"]),
            percent(kernel["coalescing"]), f"{kernel['bank_conflicts']:,.0f}",
        )  # fmt: skip


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
