"""Time checkpoints that are written beside the steps: how long a step waits for one, and what those after it lose.

    python -m bench saving
    python -m bench saving --scratch /shared/disk

A round is some steps without a checkpoint, one checkpoint that is waited for, and one that is written beside the steps
that follow, on the disk of --scratch: stage 2's step of `python -m bench step` and its whole state. A row goes into
<out>/saving_<machine>.json.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.bandwidth import copy_bytes_per_s
from bench.command_line import Parser, positive
from bench.machine import ROOT, machine_facts, source_facts, version_facts
from bench.result_file import write_rows
from bench.step_cases import StepCase, cases_of
from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed, init_distributed

FREE_STEPS = 8
"""Steps of a round without a checkpoint."""
KEPT = 2
COPY_SECONDS = 1.0


def main(arguments: list[str]) -> int:
    """The verb."""
    parser = Parser("saving", __doc__)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, help="CPU threads, default: the cores this process may use")
    parser.add_argument(
        "--scratch", type=Path, help="folder for the checkpoints, default: the system's for temporaries"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    distributed = init_distributed()
    threads = options.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    machine = machine_facts(distributed.device)
    facts = {"device": distributed.device.type, "machine": machine, "threads": threads, "versions": version_facts()}
    cases = cases_of("sit", distributed.device)
    case = cases[0] if distributed.device.type == "cuda" else cases[-1]  # in float32: many CPUs only emulate bfloat16
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        row = measure(case, Path(scratch), options.rounds, distributed)
    row["copy_bytes_per_s"] = copy_bytes_per_s(distributed.device, COPY_SECONDS)
    row = {"case": case.label, **row, **facts, **source_facts()}
    print(summary(row), flush=True)
    print("written:", write_rows(options.out, "saving", machine["name"], [row], identity))
    return 0


def identity(row: dict[str, Any]) -> Any:
    """The key that two rows of one measurement share."""
    return row["case"]


def measure(case: StepCase, scratch: Path, num_rounds: int, distributed: Distributed) -> dict[str, Any]:
    """Medians, in seconds, over rounds after a first one, which makes files, memory and optimizer state."""
    stage: Any = case.build(scratch, {}, distributed)
    batch: Any = case.batch(stage.config, distributed.device)
    saver = BackgroundSaver(Checkpointer(scratch / "checkpoints", distributed, keep=KEPT), distributed)
    number = 0

    def step() -> None:
        nonlocal number
        stage.train_step(number, batch)
        saver.settle()
        if distributed.device.type == "cuda":
            torch.cuda.synchronize()
        number += 1

    def save() -> None:
        saver.begin(number, stage.snapshot)

    found: dict[str, list[float]] = {name: [] for name in ("step", "waited_for", "blocked", "written", "step_beside")}
    with saver:
        for round_number in range(num_rounds + 1):
            timed: dict[str, list[float]] = {"step": [seconds(step) for _ in range(FREE_STEPS)]}
            timed["waited_for"] = [seconds(lambda: (save(), saver.finish()))]
            step()  # a checkpoint has the number of its step
            start_s = time.perf_counter()
            timed["blocked"] = [seconds(save)]
            timed["step_beside"] = []
            while saver.is_writing:
                timed["step_beside"].append(seconds(step))
            timed["written"] = [time.perf_counter() - start_s]
            if round_number:
                for name, values in timed.items():
                    found[name] += values
    (newest, *_) = sorted((scratch / "checkpoints").glob("step_*"), reverse=True)
    num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    medians = {f"{name}_s": statistics.median(values) for name, values in found.items()}
    return {**medians, "bytes": num_bytes, "rounds": num_rounds, "steps_beside": len(found["step_beside"])}


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def ratios(row: dict[str, Any]) -> tuple[float, float]:
    """The share of a checkpoint's time that the step waits, and a step's time beside a writer over one without."""
    return row["blocked_s"] / row["waited_for_s"], row["step_beside_s"] / row["step_s"]


def summary(row: dict[str, Any]) -> str:
    """The row in words."""
    share, slower = ratios(row)
    size = f"{row['bytes'] / 1e6:,.0f} MB"
    return (
        f"{row['case']}: a checkpoint of {size} takes {row['waited_for_s']:.2f} s; beside the steps it blocks them for "
        f"{row['blocked_s']:.3f} s ({share:.1%}) and is there after {row['written_s']:.2f} s, in which a step takes "
        f"{slower:.2f} times as long"
    )
