"""Time peers' own training steps, from checkouts that the user has, and ours with the same weights and inputs.

    python -m bench peers --repa_e=CHECKOUT --lightningdit=CHECKOUT --diffusers
    python -m bench peers --lightningdit=CHECKOUT --check           # compares first steps, times nothing
    python -m bench peers --diffusers --columns "as shipped" ours   # these columns alone

None of the peers' code is here: a checkout is a folder with `git clone` of github.com/End2End-Diffusion/REPA-E or
github.com/hustvl/LightningDiT, which is imported when this runs, with the packages that it needs; diffusers is the
installed package. The columns: the peer as shipped; with TF32, channels-last and fused AdamW; with torch.compile of
whole networks too, unless that is shipped; ours; ours with `engine.compile`. Weights go from the peer to ours by the
importers of published checkpoints.

Before anything is timed, every column makes its first step on the same random numbers, and losses and gradients are
compared with the peer's own in float32: a difference beyond rounding ends the run (`bench/peers/first_step.py`). Of a
peer that the installed torch cannot compile whole, that column is left out, and the row says so. Then each column is
timed in a process of its own, as often as --repeats says, the columns in turn. On a GPU the sizes are the papers', on a
CPU reduced ones. A row per case goes into <out>/peers_<machine>.json.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException

from bench.bandwidth import copy_bytes_per_s
from bench.command_line import Parser, chosen_cases, positive
from bench.kernel_rows import one_line
from bench.machine import ROOT, machine_facts, source_facts, version_facts
from bench.peers.case import COLUMNS, HALF, OURS_IN_FP32, ROUNDED, TRUTH, Column, PeerCase
from bench.peers.first_step import Difference, FirstStep, bounds_of, check
from bench.peers.units import PEERS, Unit, first_step, read_first_step, step_times
from bench.result_file import write_rows
from bench.timing import rotations
from sendvae_fast.errors import UserError
from sendvae_fast.processes import process_pool

ITERATIONS = {"cuda": 100, "cpu": 20}
REPEATS = 5
COPY_SECONDS = 2.0
NO_FOLDER = Path()


class Asked(NamedTuple):
    """A case of a peer, and where the peer's code is."""

    peer: str
    folder: Path
    case: PeerCase


def main(arguments: list[str]) -> int:
    """The verb."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = asked_for(options, device)
    threads = options.threads or len(os.sched_getaffinity(0))
    machine = machine_facts(device)
    facts = {"device": device.type, "machine": machine, "threads": threads, "versions": version_facts()}
    facts |= source_facts()
    iterations = options.iterations or ITERATIONS[device.type]
    path = None
    for peer, folder, case in asked:
        units = [
            Unit(peer, folder, case, column, device.type, threads)
            for column in chosen(PEERS[peer].columns(case, device), options.columns)
        ]
        print(f"{peer}: {case.label}", flush=True)
        differences, left_out = compare_first_steps(units)
        if options.check:
            continue
        units = [unit for unit in units if unit.column.name in differences]
        row = {"peer": peer, "case": case.name, "batch_size": case.ours.batch_size, **peer_facts(peer, folder)}
        row |= {"equal_mathematics": case.equal, "remark": case.remark, "iterations": iterations}
        row["left_out"] = left_out
        row["copy_bytes_per_s"] = copy_bytes_per_s(device, COPY_SECONDS)
        row["columns"] = timed(units, differences, iterations, options.repeats)
        row |= {**facts, "load_1min_after": round(os.getloadavg()[0], 2)}
        print(summary(row), flush=True)
        # After each row, so that nothing is lost when this is stopped.
        path = write_rows(options.out, "peers", machine["name"], [row], identity)
    if path is not None:
        print("written:", path)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = Parser("peers", __doc__)
    parser.add_argument("--repa_e", type=Path, metavar="CHECKOUT", help="the folder of a checkout of REPA-E")
    parser.add_argument(
        "--lightningdit", type=Path, metavar="CHECKOUT", help="the folder of a checkout of LightningDiT"
    )
    parser.add_argument("--diffusers", action="store_true", help="the installed diffusers' AutoencoderKL")
    parser.add_argument("--check", action="store_true", help="compare first steps and time nothing")
    parser.add_argument("--iterations", type=positive, help="steps timed by a process, default 100, on a CPU 20")
    parser.add_argument("--repeats", type=positive, default=REPEATS, help="processes of each column, default 5")
    parser.add_argument("--threads", type=positive, help="CPU threads, default: the cores this process may use")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="these cases, by name and batch size")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", choices=COLUMNS, help="these columns, by name")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    return parser.parse_args(arguments)


def asked_for(options: argparse.Namespace, device: torch.device) -> list[Asked]:
    """The cases of the peers that the options name.

    Raises:
        UserError: they name none, a folder is no checkout, or there is no such case.
    """
    folders = {"REPA-E": options.repa_e, "LightningDiT": options.lightningdit}
    folders["diffusers"] = NO_FOLDER if options.diffusers else None
    given = {peer: folder for peer, folder in folders.items() if folder is not None}
    if not given:
        raise UserError("name a peer: --repa_e=CHECKOUT, --lightningdit=CHECKOUT or --diffusers")
    for peer, folder in given.items():
        PEERS[peer].open_checkout(folder)
    cases = [
        (case.label, Asked(peer, folder, case)) for peer, folder in given.items() for case in PEERS[peer].cases(device)
    ]
    return chosen_cases(cases, options.cases, quick=False)


def chosen(columns: list[Column], names: list[str] | None) -> list[Column]:
    """Of the columns those of these names; all without names."""
    return [column for column in columns if names is None or column.name in names]


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, which has imported nothing and changed no setting of PyTorch."""
    with process_pool(1) as pool:
        return pool.submit(function, *arguments).result()


def compare_first_steps(units: list[Unit]) -> tuple[dict[str, Difference], dict[str, str]]:
    """Every column's difference from the truth, by name; ours is compared in float32 as well.

    Returns:
        The differences, and why a column is left out: torch cannot compile the peer's whole networks.

    Raises:
        UserError: a column does not compute the same step; nothing is timed then.
    """
    case, differences, left_out = units[0].case, {}, {}
    truth = computed(replace(units[0], column=TRUTH))

    def compare(unit: Unit, own: Difference | None) -> Difference:
        found = check(case, unit.column, computed(unit), truth, bounds_of(unit.column, own))
        print(f"  {unit.column.name:40} loss {found.loss:.1e}, gradient {found.gradient:.1e}", flush=True)
        return found

    own = {"fp32": compare(replace(units[0], column=ROUNDED), None)}
    compare(replace(units[0], column=OURS_IN_FP32), own["fp32"])
    if any(unit.column.precision != "fp32" for unit in units):
        own["bf16"] = own["fp16"] = compare(replace(units[0], column=HALF), None)
    for unit in units:
        try:
            differences[unit.column.name] = compare(unit, own[unit.column.precision])
        except TorchDynamoException as error:
            if unit.column.ours or unit.column.compile != "whole":
                raise
            left_out[unit.column.name] = one_line(error)
            print(f"  {unit.column.name:40} left out, torch.compile fails: {one_line(error)}", flush=True)
    return differences, left_out


def computed(unit: Unit) -> FirstStep:
    """A column's first step, made in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradients.safetensors"
        return read_first_step(in_a_process(first_step, unit, file), file)


def timed(
    units: list[Unit], differences: dict[str, Difference], iterations: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """The entries of the columns in a row: medians of the processes, their median and their range."""
    runs: dict[str, list[dict[str, Any]]] = {unit.column.name: [] for unit in units}
    by_name = {unit.column.name: unit for unit in units}
    for order in islice(rotations(list(runs)), repeats):
        for name in order:
            runs[name].append(in_a_process(step_times, by_name[name], iterations))
    return {
        name: column_entry(by_name[name].case, by_name[name].column, differences, of_column)
        for name, of_column in runs.items()
    }


def column_entry(
    case: PeerCase, column: Column, differences: dict[str, Difference], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """A column of a row."""
    medians = [run["median_us"] for run in runs]
    median = statistics.median(medians)
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return {
        "precision": column.precision,
        "compile": column.compile,
        "median_us": median,
        "least_us": min(medians),
        "most_us": max(medians),
        "img_per_s": case.ours.batch_size * 1e6 / median,
        "peak_bytes": max(peaks, default=None),
        "runs": runs,
        "first_step": asdict(differences[column.name]),
    }


def peer_facts(peer: str, folder: Path) -> dict[str, Any]:
    """Which code of the peer's it was."""
    checkout = PEERS[peer].open_checkout(folder)
    facts = {"commit": None, "clean": None} if checkout is None else checkout.facts()
    return {"peer_commit": facts["commit"], "peer_clean": facts["clean"], "peer_packages": PEERS[peer].packages()}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """The key that two rows of one measurement share."""
    return row["peer"], row["case"], row["batch_size"]


def summary(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    lines = [f"  copy {row['copy_bytes_per_s'] / 1e9:.1f} GB/s" + f"; {row['remark']}" * bool(row["remark"])]
    shipped = next(iter(row["columns"].values()))["median_us"]
    for name, column in row["columns"].items():
        text = f"  {name:40} {column['precision']}  {column['img_per_s']:9.2f} img/s"
        text += f"  {shipped / column['median_us']:5.2f}x"
        text += f"  [{shipped / column['most_us']:.2f}, {shipped / column['least_us']:.2f}]"
        if column["peak_bytes"]:
            text += f"  {column['peak_bytes'] / 2**30:6.1f} GiB"
        lines.append(text)
    return "\n".join(lines)
