"""Time `sendvae evaluate generation` against torch-fidelity's own command: FID, precision and recall.

Both are whole commands, imports and reading of PNG files included, on the same folders with the same weights (random
ones of the published layout without --weights, which cost the same). Each runs --repeats times, in turns. Seconds of
all CPU cores are given beside those of the clock, which other work on the machine makes longer. Where the three metrics
of the two differ, it is a failure.

A row per size goes into <out>/evaluation_<machine>.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.command_line import Parser, positive
from bench.machine import ROOT, machine_facts, source_facts, version_facts
from bench.random_inception import random_inception
from bench.result_file import write_rows
from sendvae_fast.errors import UserError

OURS, THEIRS = "sendvae evaluate", "torch-fidelity"
NAMES = {
    "frechet": "frechet_inception_distance",
    "precision": "precision",
    "recall": "recall",
}
"""torch-fidelity's names of our metrics."""
TOLERANCE = 1e-3


def main(arguments: list[str]) -> int:
    """The verb; 1 if the metrics are not the same."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--pictures", type=positive, help="samples and reference together; default 2,000, on a GPU 50,000"
    )
    parser.add_argument("--size", type=positive, default=256, help="pixels a side")
    parser.add_argument("--weights", type=Path, help="Inception's file; random weights without it")
    parser.add_argument("--repeats", type=positive, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    num = options.pictures or (50_000 if device.type == "cuda" else 2000)
    machine = machine_facts(device)
    threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))  # which both commands obey
    with tempfile.TemporaryDirectory() as folder:
        row = measured_row(Path(folder), num, options.size, options.weights, options.repeats, device)
    facts = {"device": device.type, "machine": machine, "threads": threads}
    row |= {**facts, "versions": version_facts(), **source_facts()}
    print("\n".join(summary(row)), flush=True)
    print("written:", write_rows(options.out, "evaluation", machine["name"], [row], itemgetter("case")))
    return 1 if "error" in row else 0


def measured_row(
    folder: Path, num: int, size: int, weights: Path | None, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Draw the pictures, run both commands in turns, and compare what they find."""
    sides = [folder / name for name in ("samples", "reference")]
    for seed, side in enumerate(sides):
        write_pictures(side, num // 2, size, seed)
    if weights is None:
        weights = folder / "random.pth"
        torch.save(random_inception().state_dict(), weights)
    forms: dict[str, list[dict]] = {OURS: [], THEIRS: []}
    for _ in range(repeats):
        results = folder / "results.jsonl"
        results.unlink(missing_ok=True)
        ours, _ = timed(our_command(sides, weights, results), device)
        records = [json.loads(line) for line in results.read_text().splitlines()]
        ours["metrics"] = {name: value_of(records, name) for name in NAMES}
        forms[OURS].append(ours)
        theirs, text = timed(their_command(sides, weights, device), device)
        found = json.loads(text[text.index("{") :])
        theirs["metrics"] = {name: found[theirs_name] for name, theirs_name in NAMES.items()}
        forms[THEIRS].append(theirs)
    best = {name: min(runs, key=itemgetter("cpu_s")) for name, runs in forms.items()}
    for result in best.values():
        result |= {"features_per_s": num / result["wall_s"], "features_per_cpu_s": num / result["cpu_s"]}
    row = {"case": f"{num:,} pictures of {size} px", "pictures": num, "repeats": repeats, "forms": best}
    pairs = {name: (best[OURS]["metrics"][name], best[THEIRS]["metrics"][name]) for name in NAMES}
    if wrong := {name: pair for name, pair in pairs.items() if not np.isclose(*pair, rtol=TOLERANCE)}:
        said = ", ".join(f"{name} {ours:.6g} and {theirs:.6g}" for name, (ours, theirs) in wrong.items())
        return {**row, "error": f"the two do not find the same: {said}"}
    return row


def write_pictures(folder: Path, num: int, size: int, seed: int) -> None:
    """Smooth random pictures: noise of 8 to 32 pixels a side, enlarged; the two sets differ in their detail."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(num):
        noise = rng.integers(0, 256, (8 + 8 * seed, 8 + 8 * seed, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:06d}.png", compress_level=1)


def our_command(sides: list[Path], weights: Path, results: Path) -> list[str]:
    """FID, precision and recall alone."""
    return [
        sys.executable, "-m", "sendvae_fast", "evaluate", "generation", f"--samples={sides[0]}",
        f"--reference={sides[1]}", f"--features.weights={weights}", f"--out={results}",
        "--metrics=[frechet,precision_recall]",
    ]  # fmt: skip


def their_command(sides: list[Path], weights: Path, device: torch.device) -> list[str]:
    """torch-fidelity's, on the same device."""
    where = ["--gpu", "0"] if device.type == "cuda" else ["--cpu"]
    return [
        sys.executable, "-m", "torch_fidelity.fidelity", "--input1", str(sides[0]), "--input2", str(sides[1]), "--fid",
        "--prc", "--json", "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path",
        str(weights), *where,
    ]  # fmt: skip


def timed(command: list[str], device: torch.device) -> tuple[dict[str, Any], str]:
    """Run a command: seconds of the clock and of all cores, the largest process's memory, and what it said."""
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start_s
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{' '.join(command[1:4])} ended with code {process.returncode}: {last[:300]}")
        text = output.read()
    return {"wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}, text


def value_of(records: list[dict], name: str) -> float:
    """Of our metric, whatever its features are called."""
    published = {"frechet": "fid"}.get(name, name)
    return next(record["value"] for record in records if record["metric"] == published
                or record["metric"].startswith(f"{name}_"))  # fmt: skip


def summary(row: dict[str, Any]) -> list[str]:
    """A line per form."""
    lines = [
        f"{name}: {result['wall_s']:.0f} s, {result['cpu_s']:.0f} CPU s, {result['features_per_cpu_s']:.1f} pictures a "
        f"CPU second, {result['peak_bytes'] / 2**30:.2f} GiB"
        for name, result in row["forms"].items()
    ]
    return [row["case"], *lines, *([f"error: {row['error']}"] if "error" in row else [])]
