"""README's table of methods, made from a finished comparison or demo.

    python -m bench demo runs/compare

Takes what the folder measured into bench/results/demo.json, in place of what was there, and rewrites the table between
two marks in README.md: a row for each method, means over seeds, and differences from the control seed by seed with
their intervals. Of one seed it has the intervals over pictures. Without a folder the table is made again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.command_line import Parser
from bench.evidence.analysis import mean_over_seeds
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
METRICS = {
    "frechet_judge": ("generation distance", 2),
    "decoded_frechet_judge": ("from decoded pictures", 2),
    "attribute_f1": ("attribute F1", 3),
    "psnr": ("PSNR, dB", 2),
}
"""The columns, by the name in the results: words, and digits."""
COMPARED = "frechet_judge"
"""The metric whose difference from the control has a column of its own."""


def main(arguments: list[str]) -> int:
    """The verb."""
    parser = Parser("demo", __doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a finished comparison or demo of scenes")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.folder is not None:
        write_atomic(options.results, json.dumps(measured_in(options.folder), indent=1) + "\n")
    found = read_json(options.results, "give the folder of a finished comparison")
    write_atomic(options.page, with_tables(options.page.read_text(encoding="utf-8"), table(found), BEGIN, END))
    print("written:", options.results, options.page)
    return 0


def measured_in(folder: Path) -> dict[str, Any]:
    """What a finished comparison measured: of every method and metric the values and intervals, seed by seed.

    Raises:
        UserError: it is not finished, or no comparison of scenes.
    """
    found = read_json(folder / "results.json", "give the folder of a finished comparison or demo")
    if "progress" in found:
        raise UserError(f"the comparison in {folder} is not finished: run the same command again")
    measured: dict[str, dict[str, list]] = {}
    for entry in found["variants"]:
        columns: dict[str, list] = {metric: [] for metric in METRICS}
        for file in entry["evaluations"]:
            for result in read_results(folder / file):
                if result.metric in METRICS:
                    columns[result.metric].append([result.value, result.interval])
        if missing := [metric for metric, values in columns.items() if len(values) != len(entry["evaluations"])]:
            raise UserError(f"{entry['name']} in {folder} has no {', '.join(missing)}: the table is of scenes")
        measured[entry["name"]] = columns
    settings = found["settings"]
    return {
        "seeds": settings.get("seeds") or [settings["seed"]],
        "control": found["control"],
        "pictures": found["subtitle"],
        "steps": [note for note in found["notes"] if note.endswith(" steps.")],
        "commit": found["environment"]["git_commit"],
        "measured": measured,
    }


def table(found: dict[str, Any]) -> str:
    """The table in Markdown, and what it is of."""
    several = len(found["seeds"]) > 1
    head = ["", *(title for title, _ in METRICS.values())]
    if several:
        head.insert(2, f"minus {found['control']}")
    lines = [line(head), line(["---"] * len(head))]
    for method, columns in found["measured"].items():
        cells = [method]
        for metric, (_, digits) in METRICS.items():
            values, intervals = zip(*columns[metric], strict=True)
            if not several:
                cells.append(interval_text(values[0], intervals[0], digits))
                continue
            mean = mean_over_seeds(values)
            cells.append(interval_text(mean.value, mean.interval, digits))
            if metric == COMPARED:
                cells.append(_difference(columns[metric], found["measured"][found["control"]][metric], digits))
        lines.append(line(cells))
    return "\n".join([*lines, "", _remark(found), ""])


def _difference(ours: list, theirs: list, digits: int) -> str:
    """The mean of the differences seed by seed, with its interval; nothing beside itself."""
    if ours is theirs:
        return ""
    gain = mean_over_seeds([a - b for (a, _), (b, _) in zip(ours, theirs, strict=True)])
    return interval_text(gain.value, gain.interval, digits, "+")


def _remark(found: dict[str, Any]) -> str:
    of = (
        "Means over seeds; in brackets 95 % over seeds, of differences seed by seed"
        if len(found["seeds"]) > 1
        else "In brackets 95 % over pictures, which say nothing of other seeds"
    )
    return f"{of}. Commit {found['commit'][:7]}; {found['pictures']}. {' '.join(found['steps'])}"
