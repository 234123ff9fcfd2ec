"""The files that measurements are kept in: one per benchmark and machine, a list of rows."""

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from bench.machine import slug

Row = dict[str, Any]


def write_rows(out: Path, name: str, machine: str, rows: list[Row], identity: Callable[[Row], Hashable]) -> Path:
    """Put `rows` into `<out>/<name>_<machine>.json`, in place of all rows there of the same identities."""
    path = out / f"{name}_{slug(machine)}.json"
    measured = {identity(row) for row in rows}
    kept = [row for row in json.loads(path.read_text()) if identity(row) not in measured] if path.exists() else []
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in [*kept, *rows])
    path.write_text(f"[\n{lines}\n]\n")
    return path
