"""The tables of docs/performance.md about what a call costs the host."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.goals import HostGoal, host_goal
from bench.kernel_rows import EAGER


def host_cells(results: Path) -> Iterator[tuple[list[dict[str, Any]], list[tuple[str, ...]]]]:
    """For each machine its rows, and a table's lines of them, the first being the heads."""
    for file in sorted(results.glob("host_*.json")):
        rows = json.loads(file.read_text())
        heads = ("op", "case", "pass", "eager", "ours", "ours / eager", "other", "goal")
        yield rows, [heads, *(cells_of(row) for row in rows if "forms" in row)]


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    """A table's line: least CPU times, medians in brackets."""
    forms = row["forms"]
    eager, ours = forms[EAGER], forms[row["chosen"]]
    others = [f"{name} {shown(times)}" for name, times in forms.items() if name not in (EAGER, row["chosen"])]
    return (
        row["op"], row["case"], row["pass"].replace("+", " + "), shown(eager), shown(ours),
        f"{ours['min_us'] / eager['min_us']:.2f}", "; ".join(others), goal_text(host_goal(row["pass"]), eager, ours),
    )  # fmt: skip


def goal_text(goal: HostGoal, eager: dict[str, float], ours: dict[str, float]) -> str:
    """Whether a goal is met."""
    return f"{'met' if goal.met(eager['min_us'], ours['min_us']) else '**missed**'}: {goal}"


def shown(times: dict[str, float]) -> str:
    return f"{times['min_us']:.1f} µs ({times['median_us']:.1f})"
