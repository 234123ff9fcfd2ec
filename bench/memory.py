"""Compare the memory that `sendvae plan` counts with what PyTorch's CPU allocator gives out in real steps.

    python -m bench memory
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 -m bench memory
    python -m bench memory --page

Both measure real steps of reduced networks: alone stage 1 and stage 2 under plain data parallelism, on two ranks
stage 2 under every engine, DeepSpeed with the settings that it has on GPUs. The peak is the profiler's count of the
allocator's bytes during the second step, of the rank with the least. --page writes the table of docs/planning.md.

A row per case goes into <out>/memory_<machine>.json.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from bench.command_line import Parser
from bench.machine import ROOT, machine_facts, source_facts, version_facts
from bench.markdown import line
from bench.result_file import write_rows
from bench.step_cases import NUM_CLASSES, StepCase
from bench.table import with_tables
from sendvae_fast.engine import build
from sendvae_fast.engine.deepspeed_engine import DeepSpeedEngine
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.plan.fake_step import Surroundings, fake_step
from sendvae_fast.plan.memory import tensor_memory

PAGE = ROOT / "docs" / "planning.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- made by `python -m bench memory`: begin -->", "<!-- made by `python -m bench memory`: end -->"
STEP = "measured step"
LATENT_SHAPE = (32, 16, 16)
ENGINES = {"ddp": {"name": "ddp"}} | {f"ZeRO {stage}": {"zero_stage": stage} for stage in (1, 2, 3)}
VAE = StepCase(
    "vae",
    "stage 1: f16d32 of half width, DINOv2-S, LPIPS, discriminator, 128 px",
    "vae/send_vae_f16d32.yaml",
    {
        "data": {"image_size": 128},
        "autoencoder": {"base_channels": 64},
        "alignment": {
            "foundation": {"name": "dinov2-vit-s", "grid_size": 8},
            "send": {"width": 384, "num_heads": 6},
        },
    },
    2,
)
SIT = StepCase(
    "sit",
    "stage 2: SiT-S/1, DINOv2-S, 256 px",
    "sit/xl_1.yaml",
    {"generator": {"preset": "SiT-S/1"}, "repa": {"foundation": {"name": "dinov2-vit-s"}}},
    4,
    LATENT_SHAPE,
)
SMALL_SIT = StepCase(
    "sit",
    "stage 2: SiT of width 256 and 6 blocks, without REPA, 256 px",
    "sit/xl_1.yaml",
    {
        "generator": {"preset": None, "width": 256, "depth": 6, "num_heads": 4, "patch_size": 2},
        "repa": {"weight": 0.0},
        "engine": {"precision": "fp32"},
    },
    4,
    LATENT_SHAPE,
)
"""Two ranks share a machine; what they split is the same at any size."""


class AsOnGPUs(DeepSpeedEngine):
    """DeepSpeed on a CPU with the buffers that it has on a GPU."""

    _saves_allocations = property(lambda self: False, lambda self, value: None)  # pyright: ignore[reportAssignmentType]


def main(arguments: list[str]) -> int:
    """The verb."""
    parser = Parser("memory", __doc__)
    parser.add_argument("--page", action="store_true", help="write the table of docs/planning.md from the results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.page:
        PAGE.write_text(with_tables(PAGE.read_text(), table(options.out), BEGIN, END))
        print("written:", PAGE)
        return 0
    distributed = init_distributed("cpu")
    build.ENGINES["deepspeed"] = AsOnGPUs
    machine = machine_facts(distributed.device)
    facts = {"machine": machine, "ranks": distributed.world_size, "versions": version_facts(), **source_facts()}
    runs = [(VAE, "ddp"), (SIT, "ddp")] if distributed.world_size == 1 else [(SMALL_SIT, engine) for engine in ENGINES]
    for case, engine in runs:
        row = {"case": case.name, "batch_size": case.batch_size, "engine": engine}
        row |= compare(case, ENGINES[engine], distributed)
        if distributed.is_main:
            print(f"{case.name}, {engine}: {row['measured_bytes']:,} measured, {row['planned_bytes']:,} planned")
            path = write_rows(options.out, "memory", machine["name"], [{**row, **facts}], identity)
    if distributed.is_main:
        print("written:", path)
    return 0


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """The key that two rows of one measurement share."""
    return row["case"], row["engine"], row["ranks"]


def compare(case: StepCase, engine: dict[str, Any], distributed: Distributed) -> dict[str, int]:
    """Both peaks of a case, `batch_size` pictures on each rank."""
    with tempfile.TemporaryDirectory() as scratch:
        config: Any = case.config(Path(scratch), engine)
        planned = fake_step(config, case.batch_size, Surroundings(NUM_CLASSES, LATENT_SHAPE))
        measured = measured_peak(case, Path(scratch), engine, distributed)
    # Ranks hold the same. Where gloo's thread is the last to let go of a block, the profiler does not see it freed.
    peak = min(distributed.gather_objects(measured))
    return {
        "measured_bytes": peak,
        "planned_bytes": round(sum(tensor_memory(planned, config.engine, distributed.world_size).values())),
    }


def measured_peak(case: StepCase, scratch: Path, engine: dict[str, Any], distributed: Distributed) -> int:
    """The most bytes that the CPU's allocator had given out at once in the second step, all that is built included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stage = case.build(scratch, engine, distributed)
        batch: Any = case.batch(stage.config, distributed.device)
        stage.train_step(stage.config.loop.num_steps - 1, batch)
        with record_function(STEP):
            stage.train_step(stage.config.loop.num_steps - 1, batch)
    trace = scratch / f"trace{distributed.rank}.json"
    profiled.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    (begin, end) = next((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == STEP and "dur" in e)
    memory = [event for event in events if event.get("name") == "[memory]"]
    live: dict[int, int] = {}  # by address; blocks of before, which are freed meanwhile, are not among them
    now = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        now += max(size, 0) - live.pop(address, 0)  # what gloo's thread freed shows when its address is taken again
        if size > 0:
            live[address] = size
        if begin <= event["ts"] <= end:
            peak = max(peak, now)
    return peak


def table(out: Path) -> str:
    """The rows in `out` as Markdown."""
    rows = [row for path in sorted(out.glob("memory_*.json")) for row in json.loads(path.read_text())]
    lines = [
        line(["real step", "engine, ranks", "measured, MB", "planned, MB", "error"]),
        line(["---"] * 2 + ["---:"] * 3),
    ]
    for row in sorted(rows, key=lambda row: (row["ranks"], row["case"], list(ENGINES).index(row["engine"]))):
        measured, planned = row["measured_bytes"], row["planned_bytes"]
        case = f"{row['case']}, {row['batch_size']} pictures a rank"
        cells = [case, f"{row['engine']}, {row['ranks']}", f"{measured / 1e6:,.1f}", f"{planned / 1e6:,.1f}"]
        lines.append(line([*cells, f"{planned / measured - 1:+.1%}"]))
    commits = sorted({f"{str(row['commit'])[:10]}{'' if row['clean'] else ' and later changes'}" for row in rows})
    return "\n".join([*lines, "", f"Commit {', '.join(commits)}."])
