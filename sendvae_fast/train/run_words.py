"""What a training run says of itself: a header, a line every so many steps, and where it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.loggers import GROUPS
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.ops import library

SPEED = ("img_per_s", "step_ms", "data_share", "mfu", "peak_memory_gib", "learning_rate", "grad_norm")
"""What a line has before the losses."""
NUM_NAMES = 4


def header(title: str, run: RunDirectory, step: int, num_steps: int, facts: Mapping[str, str]) -> str:
    """The lines before the first step: what goes on from where, and a stage's facts."""
    start = f"goes on after step {step:,}" if step else "starts afresh"
    lines = [f"{title}: {run.path} {start}, to step {num_steps:,}"]
    width = max(map(len, facts), default=0)
    return "\n".join([*lines, *(f"  {name:{width}}  {value}" for name, value in facts.items())])


def step_line(step: int, num_steps: int, values: Mapping[str, float], steps_per_s: float, now_s: float) -> str:
    """A line of the log: speed, then the losses, then when the run will end.

    Args:
        step: steps done.
        num_steps: steps of the run.
        values: what is logged, by name.
        steps_per_s: since this start.
        now_s: seconds since 1970.
    """
    words = {
        "img_per_s": "{:,.4g} img/s",
        "step_ms": "{:,.0f} ms",
        "data_share": "data {:.0%}",
        "mfu": "MFU {:.0%}",
        "peak_memory_gib": "{:.1f} GiB",
        "learning_rate": "lr {:.3g}",
        "grad_norm": "|g| {:.3g}",
    }
    parts = [words[name].format(values[name]) for name in SPEED if name in values]
    grouped = {name for names in GROUPS.values() for name in names}
    parts += [f"{name} {value:.4g}" for name, value in values.items() if name not in grouped]
    if step < num_steps and steps_per_s > 0:
        parts.append(f"ends {when(now_s + (num_steps - step) / steps_per_s)}")
    return "  ".join([f"step {step:,}/{num_steps:,}", *parts])


def when(seconds: float) -> str:
    """A date and a time of day, in the machine's time zone."""
    return time.strftime("%a %d %b %Y %H:%M", time.localtime(seconds))


def footer(title: str, run: RunDirectory, step: int, num_steps: int, next_command: str) -> str:
    """The lines after the last step: where the weights are, and what to run next."""
    saved = f"{run.checkpoints}/step_{step:08d}"
    if step < num_steps:
        return f"{title}: stopped after step {step:,} of {num_steps:,}; saved in {saved}; the same command goes on"
    return f"{title}: finished after step {num_steps:,}; saved in {saved}\n  next: {next_command}"


def device_words(distributed: Distributed) -> str:
    """The ranks and their devices: "16 ranks, NVIDIA H200"."""
    name = "CPU"
    if distributed.device.type == "cuda":
        name = torch.cuda.get_device_name(distributed.device)
    return f"{distributed.world_size} rank{'s' if distributed.world_size > 1 else ''}, {name}"


def ops_facts() -> dict[str, str]:
    """That the compiled ops are missing, and why, for the header; empty where they are there."""
    missing = library.status()["cpu"]
    return (
        {} if missing is None else {"ops": f"of Triton or PyTorch, slower than the compiled ones, which are {missing}"}
    )


def picture_words(catalog: Catalog) -> str:
    """How many pictures in which classes, and a doubt where their folders look like something else."""
    names = list(catalog.class_names)
    shown = ", ".join(names[:NUM_NAMES]) + (", ..." if len(names) > NUM_NAMES else "")
    words = f"{len(catalog):,} in {len(names):,} class{'es' if len(names) != 1 else ''} ({shown}) of {catalog.root}"
    deep = next((name for name in catalog.names if name.count("/") > 1), None)
    if deep is not None:
        words += (
            f"\n    note: some lie deeper than class/picture ({deep}): if its inner folders are the classes, give the "
            f"folder above them, {catalog.root}/{deep.split('/')[0]}"
        )
    return words


def count_words(count: float) -> str:
    """A large number with three digits and its unit: "675 M"."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.{2 - min(2, int(math.log10(count / 10**power)))}f} {unit}"
    return f"{count:.0f}"
