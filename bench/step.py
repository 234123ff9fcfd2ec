"""Time a whole training step, optimizer included and data excluded, against the same step in plain PyTorch.

    python -m bench step --stage vae
    python -m bench step --stage sit
    python -m bench step --stage e2e
    python -m bench step --stage sit --engines ddp zero0 zero1 zero2

The forms (`bench/step_forms.py`): eager, eager compiled with channels-last pictures, ours, ours with `engine.compile`.
They start from the same weights and the same batch; the first step's losses are compared before anything is timed, and
differing ones end the run. All forms are then timed in turn. On a GPU the sizes are the paper's, on a CPU reduced ones.

With --engines the step is timed under the engines instead, in turn; under torchrun on all its ranks:

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 -m bench step --stage sit --engines ddp zero0 zero1 zero2

On a GPU ddp_graph is ddp with `engine.cuda_graph`:

    python -m bench step --stage sit --engines ddp ddp_graph

A row per case goes into <out>/step_<stage>_<machine>.json.
"""

import gc
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.command_line import Parser, chosen_cases, positive
from bench.gemm import gemm_flops_per_s
from bench.goals import step_verdicts
from bench.machine import ROOT, machine_facts, source_facts, version_facts
from bench.result_file import write_rows
from bench.step_cases import STAGES, StepCase, cases_of
from bench.step_engines import ENGINES, engine_forms
from bench.step_forms import Form, check_losses, forms_of
from bench.step_names import OURS
from bench.step_parts import parts_of
from bench.timing import time_interleaved
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.engine import dtype_of
from sendvae_fast.engine.flops import count_flops
from sendvae_fast.errors import UserError

SAMPLE_S = 1e-3  # a step is longer: one step is a sample


def main(arguments: list[str]) -> int:
    """The verb."""
    parser = Parser("step", __doc__)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="compare engines, ours in each")
    parser.add_argument("--seconds", type=float, help="measuring time of each case, default 60, --quick 10")
    parser.add_argument("--threads", type=positive, help="CPU threads, default: the cores this process may use")
    parser.add_argument("--quick", action="store_true", help="eager and ours alone, the first case alone, no parts")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="these cases, by name and batch size")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    seconds = options.seconds or (10.0 if options.quick else 60.0)
    distributed = init_distributed(cuda_graph="ddp_graph" in (options.engines or ()))
    if distributed.world_size > 1 and not options.engines:
        raise UserError("under torchrun only engines are compared: give --engines, or start it without torchrun")
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // distributed.world_size)
    torch.set_num_threads(threads)
    machine = machine_facts(distributed.device)
    facts = {"device": distributed.device.type, "machine": machine, "threads": threads, "versions": version_facts()}
    facts |= {"ranks": distributed.world_size, **source_facts()}
    cases = [(case.label, case) for case in cases_of(options.stage, distributed.device)]
    for case in chosen_cases(cases, options.cases, quick=options.quick):
        with tempfile.TemporaryDirectory() as scratch:
            if options.engines:
                row = engine_forms(case, options.engines, Path(scratch), distributed, seconds)
            else:
                row = measure(case, Path(scratch), distributed, seconds, quick=options.quick)
        release_memory()
        row = {"stage": case.stage, "case": case.name, "batch_size": case.batch_size, **row, **facts}
        if distributed.is_main:
            print(summary(row), flush=True)
            # After each row, so that nothing is lost when this is stopped.
            path = write_rows(options.out, f"step_{case.stage}", machine["name"], [row], identity)
    if distributed.is_main:
        print("written:", path)
    return 0


def measure(
    case: StepCase, scratch: Path, distributed: Distributed, seconds: float, *, quick: bool = False
) -> dict[str, Any]:
    """The row of a case: every form's time and memory, the arithmetic, the parts of ours."""
    device = distributed.device
    forms = forms_of(compile=not quick)
    batch = None
    for form in forms:
        before = memory_bytes(device)
        form.build(case, scratch, distributed)
        batch = batch or case.batch(form.stage.config, device)
        form.losses = {name: float(value) for name, value in form.step(0, batch, same_noise=True).items()}
        form.state_bytes = memory_bytes(device) - before
    dtype = dtype_of(forms[0].stage.config.engine)
    check_losses(forms, dtype)
    flops = count_flops(lambda: forms[0].step(1, batch)) / case.batch_size
    gemm = gemm_flops_per_s(device, dtype, seconds=0.1 * seconds)
    steps: dict[str, Any] = {form.name: lambda _, form=form: form.step(1, batch) for form in forms}
    timings = time_interleaved(device, steps, 1, seconds, SAMPLE_S)
    results = {}
    for form in forms:
        per_s = case.batch_size * 1e6 / timings[form.name].median_us
        results[form.name] = {
            **asdict(timings[form.name]), "img_per_s": per_s, "of_gemm": per_s * flops / gemm,
            "peak_bytes": peak_bytes(form, batch, device), "losses": form.losses,
        }  # fmt: skip
    row = {
        "precision": str(dtype).removeprefix("torch."),
        "flops_per_image": flops,
        "gemm_flops_per_s": gemm,
        "forms": results,
    }
    if not quick:
        ours = next(form for form in forms if form.name == OURS)
        parts = time_interleaved(device, parts_of(ours.stage, batch), 1, 0.25 * seconds, SAMPLE_S)
        row["parts"] = {name: asdict(timing) for name, timing in parts.items()}
    return row


def release_memory() -> None:
    """Let go of a case's networks, which engines and compiled blocks hold in cycles, before the next one's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_bytes(device: torch.device) -> int:
    """The memory of tensors on a GPU; 0 on a CPU, where it is not counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(form: Form, batch: Any, device: torch.device) -> int | None:
    """The most memory a step of this form needs with its weights and optimizer, as if it were alone on the GPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    form.step(1, batch)
    return torch.cuda.max_memory_allocated(device) - before + form.state_bytes


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """The key that two rows of one measurement share."""
    return row["case"], row["precision"], row["batch_size"], row["ranks"], "engines" in row


def summary(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    lines = [f"{row['stage']}: {row['case']}, batch {row['batch_size']}, {row['precision']}, {row['ranks']} ranks"]
    forms = row.get("engines") or row["forms"]
    base = next(iter(forms.values()))["median_us"]
    for name, result in forms.items():
        text = f"  {name:30} {result['img_per_s']:9.2f} img/s  {base / result['median_us']:5.2f}x"
        if "of_gemm" in result:
            text += f"  {result['of_gemm']:6.1%} of GEMM"
        if result.get("peak_bytes"):
            text += f"  {result['peak_bytes'] / 2**30:6.1f} GiB"
        lines.append(text)
    if "parts" in row:
        step = row["forms"][OURS]["median_us"]
        lines += [
            f"  {name:30} {part['median_us'] / 1e3:9.1f} ms  {part['median_us'] / step:6.1%}"
            for name, part in row["parts"].items()
        ]
    if "flops_per_image" in row:
        lines.append(
            f"  {row['flops_per_image'] / 1e9:.1f} GFLOP per image; GEMM {row['gemm_flops_per_s'] / 1e12:.3f} TFLOP/s"
        )
    return "\n".join([*lines, *(f"  {verdict}" for verdict in step_verdicts(row))])
