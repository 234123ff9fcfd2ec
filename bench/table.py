"""Rewrite the tables of docs/performance.md from the rows in bench/results: one per machine, nothing typed by hand.

The tables stand between two marker comments; the rest of the page is left alone.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.command_line import Parser
from bench.goals import evaluation_verdict, median_us, ratio, sampling_verdicts, step_verdicts, verdicts
from bench.host_table import host_cells
from bench.kernel_rows import COMPILED, COPY, EAGER
from bench.kernels import errors_of
from bench.machine import ROOT
from bench.markdown import duration, line, percent, times
from bench.peers.table import peers_tables
from bench.predicted_table import BEGIN as PREDICTED_BEGIN
from bench.predicted_table import END as PREDICTED_END
from bench.predicted_table import predicted_tables
from bench.saving import ratios
from bench.step_names import OURS
from sendvae_fast.errors import UserError
from sendvae_fast.ops.dispatch import BACKENDS

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- made by `python -m bench table`: begin -->", "<!-- made by `python -m bench table`: end -->"
DATA_BEGIN = "<!-- data, made by `python -m bench table`: begin -->"
DATA_END = "<!-- data, made by `python -m bench table`: end -->"
SAMPLING_BEGIN = "<!-- sampling, made by `python -m bench table`: begin -->"
SAMPLING_END = "<!-- sampling, made by `python -m bench table`: end -->"
HOST_BEGIN = "<!-- host, made by `python -m bench table`: begin -->"
HOST_END = "<!-- host, made by `python -m bench table`: end -->"
EVALUATION_BEGIN = "<!-- evaluation, made by `python -m bench table`: begin -->"
EVALUATION_END = "<!-- evaluation, made by `python -m bench table`: end -->"
STEP_BEGIN = "<!-- steps, made by `python -m bench table`: begin -->"
STEP_END = "<!-- steps, made by `python -m bench table`: end -->"
SAVING_BEGIN = "<!-- saving, made by `python -m bench table`: begin -->"
SAVING_END = "<!-- saving, made by `python -m bench table`: end -->"
PEERS_BEGIN = "<!-- peers, made by `python -m bench table`: begin -->"
PEERS_END = "<!-- peers, made by `python -m bench table`: end -->"
COLUMNS = (EAGER, COMPILED, *(name for name in BACKENDS if name != "reference"), COPY)


def main(arguments: list[str]) -> int:
    """The verb."""
    parser = Parser("table", __doc__)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    page = with_tables(options.page.read_text(), tables(options.results), BEGIN, END)
    page = with_tables(page, predicted_tables(options.results), PREDICTED_BEGIN, PREDICTED_END)
    page = with_tables(page, host_tables(options.results), HOST_BEGIN, HOST_END)
    page = with_tables(page, data_tables(options.results), DATA_BEGIN, DATA_END)
    page = with_tables(page, sampling_tables(options.results), SAMPLING_BEGIN, SAMPLING_END)
    page = with_tables(page, saving_tables(options.results), SAVING_BEGIN, SAVING_END)
    page = with_tables(page, evaluation_tables(options.results), EVALUATION_BEGIN, EVALUATION_END)
    page = with_tables(page, peers_tables(options.results), PEERS_BEGIN, PEERS_END)
    options.page.write_text(with_tables(page, step_tables(options.results), STEP_BEGIN, STEP_END))
    print("written:", options.page)
    return 0


def with_tables(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with `text` between two of its markers."""
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise UserError(f"the page needs these two lines, once each and in this order: {begin} and {end}")
    before, after = page.split(begin, maxsplit=1)[0], page.split(end, maxsplit=1)[1]
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def tables(results: Path) -> str:
    """Every machine's tables, in the order of the file names."""
    files = sorted(results.glob("kernels_*.json"))
    return "\n".join(machine_tables(json.loads(file.read_text())) for file in files)


def data_tables(results: Path) -> str:
    """The data path's tables, one per machine."""
    lines = []
    for file in sorted(results.glob("data_*.json")):
        rows = json.loads(file.read_text())
        lines += [f"### {rows[0]['machine']['name']}", "", *provenance(rows), ""]
        lines += [line(("part", "what", "way", "items/s", "quartiles")), line(["---"] * 5)]
        for row in rows:
            for name, result in row["forms"].items():
                quartiles = f"{result['q1_per_s']:,.0f} .. {result['q3_per_s']:,.0f}"
                lines.append(line((row["part"], row["what"], name, f"{result['per_s']:,.0f} {row['unit']}", quartiles)))
        lines.append("")
    return "\n".join(lines)


def host_tables(results: Path) -> str:
    """The tables of what a call costs the host, one per machine."""
    lines = []
    for rows, (heads, *cells) in host_cells(results):
        lines += [f"### {rows[0]['machine']['name']}", "", *provenance(rows), ""]
        lines += [line(heads), line(["---"] * len(heads)), *map(line, cells), ""]
    return "\n".join(lines)


def sampling_tables(results: Path) -> str:
    """The sampler's tables, one per machine."""
    lines = []
    for file in sorted(results.glob("sampling_*.json")):
        rows = json.loads(file.read_text())
        lines += [f"### {rows[0]['machine']['name']}", "", *provenance(rows), ""]
        lines += [line(("case", "form", "a step", "img/s", "vs eager", "peak memory", "error", "goals"))]
        lines += [line(["---"] * 8)]
        for row in rows:
            lines += [line(cells) for cells in sampling_cells(row)]
        lines += ["", *(f"Failed: {row['case']}: {row['error']}" for row in rows if "error" in row)]
    return "\n".join(lines)


def sampling_cells(row: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """A table row per form."""
    eager_ms = row["forms"][EAGER].get("step_ms")
    for name, result in row["forms"].items():
        peak = f"{result['peak_bytes'] / 2**30:.1f} GiB" if result["peak_bytes"] else ""
        goals = "<br>".join(sampling_verdicts(row)) if name == "ours" else ""
        timed = ("", "", "")
        if "step_ms" in result:
            step_ms = result["step_ms"]
            spread = (result["q3_ms"] - result["q1_ms"]) / 2 / step_ms
            step = f"{duration(1e3 * step_ms)} ±{spread:.0%}"
            timed = (step, f"{result['img_per_s']:.3g}", times(eager_ms / step_ms))
        yield (row["case"], name, *timed, peak, f"{result['error']:.1e}", goals)


def evaluation_tables(results: Path) -> str:
    """The evaluation's tables, one per machine."""
    lines = []
    for file in sorted(results.glob("evaluation_*.json")):
        rows = json.loads(file.read_text())
        lines += [f"### {rows[0]['machine']['name']}", "", *provenance(rows), ""]
        heads = ("case", "command", "time", "CPU time", "pictures a CPU second", "peak memory", "goal")
        lines += [line(heads), line(["---"] * len(heads))]
        for row in rows:
            for name, result in row["forms"].items():
                times_s = (f"{result['wall_s']:.0f} s", f"{result['cpu_s']:.0f} s")
                peak = f"{result['peak_bytes'] / 2**30:.2f} GiB"
                goal = evaluation_verdict(row) if name == "sendvae evaluate" else ""
                lines.append(line((row["case"], name, *times_s, f"{result['features_per_cpu_s']:.1f}", peak, goal)))
        lines += ["", *(f"Failed: {row['case']}: {row['error']}" for row in rows if "error" in row)]
    return "\n".join(lines)


def saving_tables(results: Path) -> str:
    """The tables of checkpoints beside the steps, one per machine."""
    lines = []
    for file in sorted(results.glob("saving_*.json")):
        rows = json.loads(file.read_text())
        lines += [f"### {rows[0]['machine']['name']}", "", *provenance(rows), ""]
        heads = (
            "case",
            "size",
            "waited for",
            "blocks the steps",
            "of it",
            "there after",
            "step",
            "step beside",
            "ratio",
        )
        lines += [line(heads), line(["---"] * len(heads))]
        for row in rows:
            share, slower = ratios(row)
            times_s = ("waited_for", "blocked", "written", "step", "step_beside")
            waited_for, blocked, written, step, beside = (duration(1e6 * row[f"{name}_s"]) for name in times_s)
            size = f"{row['bytes'] / 1e6:,.0f} MB"
            lines.append(
                line((row["case"], size, waited_for, blocked, percent(share), written, step, beside, times(slower)))
            )
        lines.append("")
    return "\n".join(lines)


def step_tables(results: Path) -> str:
    """The training steps: a table of times per stage and machine, one of parts, and the goals."""
    lines = []
    for file in sorted(results.glob("step_*.json")):
        rows = json.loads(file.read_text())
        lines += [f"### {rows[0]['stage']}, {rows[0]['machine']['name']}", "", *provenance(rows), ""]
        heads = ("case", "batch", "precision", "form", "step", "img/s", "vs first", "of GEMM", "peak memory")
        lines += [line(heads), line(["---"] * len(heads)), *(line(cells) for row in rows for cells in step_cells(row))]
        lines.append("")
        if parted := [row for row in rows if "parts" in row]:
            lines += [line(("case", "precision", "part of ours", "time", "of the step")), line(["---"] * 5)]
            lines += [line(cells) for row in parted for cells in part_cells(row)]
            lines.append("")
        if cells := [cells for row in rows for cells in engine_cells(row)]:
            heads = (
                "case",
                "precision",
                "engine",
                "CPU time",
                "vs first",
                "in backward",
                "in the update",
                "page faults",
            )
            lines += [line(heads), line(["---"] * len(heads)), *map(line, cells), ""]
        lines += [
            f"- {row['case']}, batch {row['batch_size']}, {row['precision']}: {verdict}"
            for row in rows
            for verdict in step_verdicts(row)
        ]
        lines.append("")
    return "\n".join(lines)


def step_cells(row: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """A table's lines for one row: its forms, or its engines."""
    forms = row.get("engines") or row["forms"]
    first = next(iter(forms.values()))
    ranks = f", {row['ranks']} ranks" if row["ranks"] > 1 else ""
    for name, result in forms.items():
        spread = (result["q3_us"] - result["q1_us"]) / 2 / result["median_us"]
        peak = result.get("peak_bytes")
        yield (
            f"{row['case']}{ranks}", str(row["batch_size"]), row["precision"], name,
            f"{duration(result['median_us'])} ±{spread:.0%}", f"{result['img_per_s']:.3g}",
            times(first["median_us"] / result["median_us"]), percent(result.get("of_gemm")),
            "" if peak is None else f"{peak / 2**30:.1f} GiB",
        )  # fmt: skip


def part_cells(row: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """A table's lines for the parts of one row's step, the longest first."""
    step_us = row["forms"][OURS]["median_us"]
    for name, part in sorted(row["parts"].items(), key=lambda item: -item[1]["median_us"]):
        share = percent(part["median_us"] / step_us)
        yield row["case"], row["precision"], name, duration(part["median_us"]), share


def engine_cells(row: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """A table's lines for the costs of a step on rank 0 under every engine, where they were measured."""
    costs = {name: result["rank0"] for name, result in row.get("engines", {}).items() if "rank0" in result}
    for name, cost in costs.items():
        first_us = next(iter(costs.values()))["cpu_us"]
        yield (
            f"{row['case']}, {row['ranks']} ranks", row["precision"], name, duration(cost["cpu_us"]),
            times(cost["cpu_us"] / first_us), duration(cost["backward_us"]), duration(cost["update_us"]),
            f"{cost['page_faults']:,.0f}",
        )  # fmt: skip


def machine_tables(rows: list[dict[str, Any]]) -> str:
    """The part of the page about one machine."""
    machine = rows[0]["machine"]
    lines = [f"### {machine['name']}", "", *provenance(rows), ""]
    if rows[0]["device"] == "cuda":
        lines += ["On the device, within a CUDA graph:", "", *table(rows, "graph"), ""]
        lines += ["As launched from Python:", "", *table(rows, None, goals=False), ""]
    else:
        lines += [*table(rows, None), ""]
    if failures := [f"- {title(row)}: {error}" for row in rows for error in errors_of(row)]:
        lines += ["Failed:", "", *failures, ""]
    return "\n".join(lines)


def provenance(rows: list[dict[str, Any]]) -> list[str]:
    """The commit, versions, threads and load behind the numbers, one line per commit measured."""
    lines = {}
    for row in rows:
        tree = {True: "", False: " with uncommitted changes", None: " (tree not checked)"}[row["clean"]]
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
        lines.setdefault(
            (row["commit"], row["clean"], row["date"], row["threads"], versions),
            f"commit {(row['commit'] or 'unknown')[:10]}{tree}, {row['date']}, {versions}, "
            f"{row['threads']} CPU threads, load {row['machine']['load_1min']} at the start",
        )
    return [f"- {text}" for text in lines.values()]


def table(rows: list[dict[str, Any]], kind: str | None, *, goals: bool = True) -> list[str]:
    """One Markdown table; `kind` as for `median_us`."""
    measured = [row for row in rows if "forms" in row]
    columns = [name for name in COLUMNS if any(name in row["forms"] for row in measured)]
    others = sorted({name for row in measured for name in row["forms"]} - set(columns))
    lines = []
    for row in measured:
        cells = {"op": row["op"], "case": row["case"], "pass": row["pass"].replace("+", " + ")}
        cells |= {name: cell(row, name, kind) for name in columns}
        if others:
            cells["other"] = "; ".join(f"{name} {cell(row, name, kind)}" for name in others if name in row["forms"])
        cells["vs eager"], cells["vs compile"] = (times(ratio(row, name, kind)) for name in (EAGER, COMPILED))
        cells["of copy"] = percent(ratio(row, COPY, kind))
        cells["GB/s"], cells["copy GB/s"] = (rate(row, name, kind) for name in (row["chosen"], COPY))
        if goals:
            cells["goals"] = "<br>".join(map(str, verdicts(row, kind)))
        if not lines:
            lines = [line(cells), line("---" for _ in cells)]
        lines.append(line(cells.values()))
    return lines


def title(row: dict[str, Any]) -> str:
    return ", ".join(part for part in (row["op"], row["case"], row["pass"]) if part)


def cell(row: dict[str, Any], form: str, kind: str | None) -> str:
    """A form's median and half its interquartile range; bold for the backend that the op takes by itself."""
    result = row["forms"].get(form)
    if result is None:
        return ""
    if "error" in result:
        return "failed"
    timing = result if kind is None else result.get(kind)
    if timing is None:
        return "not captured"
    spread = (timing["q3_us"] - timing["q1_us"]) / 2 / timing["median_us"]
    text = f"{duration(timing['median_us'])} ±{spread:.0%}"
    return f"**{text}**" if form == row["chosen"] else text


def rate(row: dict[str, Any], form: str, kind: str | None) -> str:
    median = median_us(row, form, kind)
    return "" if median is None else f"{row['bytes'] / median / 1e3:.0f}"
