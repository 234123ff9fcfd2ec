"""README's table of the demo, made from finished demos.

    python -m bench demo runs/demo [FOLDER ...]

Takes what each folder measured into bench/results/demo.json, in place of an earlier demo of the same settings and seed,
and rewrites the table between two marks in README.md. Of one seed it has the intervals over pictures that the demo
gives; of several, means over seeds, and differences from the control seed by seed with their intervals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.command_line import Parser
from bench.evidence.analysis import mean_over_seeds
from bench.evidence.study import short_hash
from bench.machine import ROOT
from bench.markdown import interval_text, line
from bench.table import with_tables
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.files import write_atomic
from sendvae_fast.reading import read_json

PAGE = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "demo.json"
BEGIN, END = "<!-- made by `python -m bench demo`: begin -->", "<!-- made by `python -m bench demo`: end -->"
METHODS = {"plain": "Plain VAE", "control": "Control", "send": "Send-VAE"}
"""The demo's default columns, by their folders."""
METRICS = {
    "attribute_f1": ("attribute F1", 3),
    "frechet_judge": ("generation distance", 1),
    "decoded_frechet_judge": ("generation distance from decoded pictures", 1),
    "rfrechet_judge": ("reconstruction distance", 1),
    "psnr": ("PSNR, dB", 1),
}
"""By the name in the results: its words, and digits."""

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """The verb."""
    parser = Parser("demo", __doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="finished demos")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = json.loads(options.results.read_text()) if options.results.is_file() else []
    new = [row_of(folder) for folder in options.folders]
    rows = [row for row in rows if identity(row) not in set(map(identity, new))] + new
    write_atomic(options.results, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    write_atomic(options.page, with_tables(options.page.read_text(encoding="utf-8"), text(rows), BEGIN, END))
    print("written:", options.results, options.page)
    return 0


def row_of(folder: Path) -> Row:
    """What a finished demo measured.

    Raises:
        UserError: it is not finished, or no demo.
    """
    found = read_json(folder / "results.json", "give the folder of a finished demo")
    if "progress" in found:
        raise UserError(f"the demo in {folder} is not finished: run `sendvae demo --run={folder}` again")
    settings = {key: value for key, value in found["settings"].items() if key not in ("run", "seed", "methods")}
    measured = {}
    for method in METHODS:
        results = read_results(folder / method / "evaluation.jsonl")
        values = {result.metric: (result.value, result.interval) for result in results if result.metric in METRICS}
        if missing := METRICS.keys() - values.keys():
            raise UserError(f"{folder}/{method} has no {', '.join(sorted(missing))}: the table is of demos of scenes")
        measured[method] = values
    commit = found["environment"]["git_commit"]
    return {"settings": settings, "seed": found["settings"]["seed"], "commit": commit, "measured": measured}


def identity(row: Row) -> tuple[str, int]:
    """The settings and the seed."""
    return short_hash(row["settings"]), row["seed"]


def text(rows: Sequence[Row]) -> str:
    """A table for each settings that a demo was run with."""
    by_settings: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        by_settings.setdefault(identity(row)[0], []).append(row)
    return "\n".join(table(group) for group in by_settings.values())


def table(rows: Sequence[Row]) -> str:
    """Of demos of the same settings and different seeds."""
    keys = list(METHODS)
    several = len(rows) > 1
    head = ["", *METHODS.values(), *(["Send-VAE - control"] if several else [])]
    lines = [line(head), line(["---"] * len(head))]
    for metric, (title, digits) in METRICS.items():
        values = {key: [row["measured"][key][metric][0] for row in rows] for key in keys}
        if several:
            cells = [f"{mean_over_seeds(values[key]).value:.{digits}f}" for key in keys]
            pairs = [ours - theirs for ours, theirs in zip(values["send"], values["control"], strict=True)]
            gain = mean_over_seeds(pairs)
            cells.append(interval_text(gain.value, gain.interval, digits, "+"))
        else:
            found = [rows[0]["measured"][key][metric] for key in keys]
            cells = [interval_text(value, interval, digits) for value, interval in found]
        lines.append(line([title, *cells]))
    return "\n".join([*lines, "", remark(rows), ""])


def remark(rows: Sequence[Row]) -> str:
    """What the numbers are of."""
    settings, commits = rows[0]["settings"], ", ".join(sorted({str(row["commit"])[:7] for row in rows}))
    seeds = ", ".join(str(row["seed"]) for row in rows)
    of = (
        f"Means over seeds {seeds}; in brackets 95 % over seeds"
        if len(rows) > 1
        else f"Seed {seeds}; in brackets 95 % over pictures, which say nothing of other seeds"
    )
    return (
        f"{of}. Commit {commits}; {settings['vae_steps']:,} steps of the plain VAE, {settings['finetune_steps']:,} of "
        f"each fine-tuning, {settings['generator_steps']:,} of each generator, "
        f"{settings['generate']['num_samples']:,} pictures."
    )
