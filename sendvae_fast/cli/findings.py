"""The lines of `sendvae doctor`, each with a verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Verdict = Literal["ok", "note", "warning", "broken"]
"""ok: looked at, and fine. note: a fact, or something optional that is not there. warning: slow, or soon a problem.
broken: it will not work."""
MARKS = {"ok": "[green]ok[/]", "note": "[dim]-[/]", "warning": "[yellow]warning[/]", "broken": "[red]broken[/]"}


@dataclass
class Findings:
    """Lines of the report, grouped, each with a verdict."""

    lines: list[tuple[str, str, str, Verdict]] = field(default_factory=list)

    def add(self, group: str, name: str, value: Any, verdict: Verdict = "note") -> None:
        """One line."""
        self.lines.append((group, name, str(value), verdict))

    @property
    def exit_code(self) -> int:
        """0 when all is well, 1 with warnings, 2 when something is broken."""
        verdicts = {verdict for *_, verdict in self.lines}
        return 2 if "broken" in verdicts else 1 if "warning" in verdicts else 0

    def print_json(self) -> None:
        """The lines for programs: objects with group, name, value and verdict."""
        keys = ("group", "name", "value", "verdict")
        print(json.dumps([dict(zip(keys, line, strict=True)) for line in self.lines], indent=1))

    def print_table(self) -> None:
        """The lines for people."""
        table = Table(box=None, pad_edge=False, show_header=False)
        group_before = None
        for group, name, value, verdict in self.lines:
            if group != group_before and group_before is not None:
                table.add_row()
            table.add_row(f"[bold]{group}[/]" if group != group_before else "", name, MARKS[verdict], escape(value))
            group_before = group
        Console().print(table)
