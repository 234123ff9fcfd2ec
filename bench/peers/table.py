"""The tables of peers' steps beside ours, made from bench/results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.markdown import duration, line, times

HEADS = (
    "peer", "case", "column", "precision", "step", "img/s", "vs as shipped", "peak memory", "loss off by",
    "gradient off by",
)  # fmt: skip


def peers_tables(results: Path) -> str:
    """A table per machine, each with the peers' commits and packages, and what a row does not compare."""
    lines = []
    for file in sorted(results.glob("peers_*.json")):
        rows = json.loads(file.read_text())
        lines += [f"### {rows[0]['machine']['name']}", "", *dict.fromkeys(map(provenance, rows)), ""]
        lines += [line(HEADS), line(["---"] * len(HEADS)), *(line(cells) for row in rows for cells in cells_of(row))]
        remarks = [f"- {row['peer']}, {row['case']}: {row['remark']}" for row in rows if row["remark"]]
        remarks += [
            f"- {row['peer']}, {row['case']}: no column {name!r}, torch {row['versions']['torch']} fails at it: {why}"
            for row in rows
            for name, why in row.get("left_out", {}).items()
        ]
        lines += ["", *remarks, ""]
    return "\n".join(lines) or "No machine has been measured yet.\n"


def provenance(row: dict[str, Any]) -> str:
    """Which code of both sides a row is of, and the machine's speed and load."""
    column = next(iter(row["columns"].values()))
    packages = ", ".join(f"{name} {version}" for name, version in row["peer_packages"].items())
    theirs = f"{row['peer']} {_commit(row['peer_commit'], row['peer_clean'])}".strip()
    return (
        f"- {theirs} with {packages}; ours {_commit(row['commit'], row['clean'])}, {row['date']}, "
        f"torch {row['versions']['torch']}, {row['threads']} CPU threads, "
        f"{row['iterations']} steps in each of {len(column['runs'])} processes, copy "
        f"{row['copy_bytes_per_s'] / 1e9:.0f} GB/s, load {row['machine']['load_1min']} before and "
        f"{row['load_1min_after']} after"
    )


def _commit(commit: str | None, clean: bool | None) -> str:
    return "" if commit is None else f"commit {commit[:10]}{'' if clean else ' with changes'}"


def cells_of(row: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """A line per column. Ratios are to the peer as shipped, in brackets over the processes' range."""
    shipped_us = next(iter(row["columns"].values()))["median_us"]
    for name, column in row["columns"].items():
        ratio = times(shipped_us / column["median_us"])
        spread = f"[{shipped_us / column['most_us']:.2f}, {shipped_us / column['least_us']:.2f}]"
        peak, off = column["peak_bytes"], column["first_step"]
        yield (
            row["peer"], f"{row['case']}, batch {row['batch_size']}", name, column["precision"],
            duration(column["median_us"]), f"{column['img_per_s']:.3g}", f"{ratio} {spread}",
            "" if peak is None else f"{peak / 2**30:.1f} GiB", f"{off['loss']:.0e}", f"{off['gradient']:.0e}",
        )  # fmt: skip
