"""A window of steps under PyTorch's profiler: a trace for its viewers, and a table for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.files import staged_output, write_atomic

SKIPPED_STEPS = 10
"""Steps before the window: the first ones compile, choose kernels and fill caches."""
NUM_ROWS = 25


@contextmanager
def profiling(num_steps: int, folder: Path, distributed: Distributed) -> Iterator[Callable[[], object]]:
    """Context of training; what it gives is called after each step.

    Rank 0 writes `trace.json.gz` (chrome://tracing, Perfetto) and `summary.txt`, the operations that take longest, once
    the window is over. What fails there is a warning.

    Args:
        num_steps: of the window, which begins `SKIPPED_STEPS` after this start; 0 profiles nothing.
        folder: made where it is missing.
        distributed: the ranks.
    """
    if num_steps == 0 or not distributed.is_main:
        yield lambda: None
        return
    on_gpu = distributed.device.type == "cuda"
    plan = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=num_steps, repeat=1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(
        activities=activities, schedule=plan, on_trace_ready=lambda done: _write(done, folder, on_gpu)
    ) as window:
        yield window.step


def _write(window: profile, folder: Path, on_gpu: bool) -> None:
    try:
        with staged_output(folder / "trace.json.gz") as unfinished:
            trace = unfinished.with_name(f"{unfinished.name}.json.gz")  # it is told by its name that it is to be packed
            window.export_chrome_trace(str(trace))
            trace.replace(unfinished)
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = window.key_averages().table(sort_by=order, row_limit=NUM_ROWS, max_name_column_width=60)
        write_atomic(folder / "summary.txt", table + "\n")
        print(f"profile: {folder}/summary.txt and trace.json.gz (open it in ui.perfetto.dev)", file=sys.stderr)
    except Exception as error:
        print(f"warning: the profile was not written ({error}); training goes on", file=sys.stderr)
