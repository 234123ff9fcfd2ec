"""Report this machine's hardware and packages, the backend of each op, and possible improvements.

    sendvae doctor
    sendvae doctor --json --data=imagenet/train --out=runs
    sendvae doctor --tune_attention      # measure the attention libraries at the paper's shapes, for later runs

Exits 0 when all is well, 1 with warnings, 2 when something is broken.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.run import environment
from sendvae_fast.errors import UserError
from sendvae_fast.ops import available_attention, dispatch, library, tune_attention
from sendvae_fast.ops.attention.table import load, table_path
from sendvae_fast.ops.attention.tuning import model_shapes
from sendvae_fast.version import __version__

REQUIRED_PACKAGES = ("torch", "numpy", "pillow", "safetensors")
OPTIONAL_PACKAGES = {
    "nvidia-dali-cuda130": "GPU image decoding",
    "flash-attn": "flash attention 2",
    "flash-attn-4": "flash attention 4",
    "xformers": "attention kernels",
    "tensorboard": "training curves",
}
MIN_OPEN_FILES = 4096
MIN_FREE_GIB = 10.0
GIB = 2**30

Verdict = Literal["ok", "warning", "broken"]


@dataclass(kw_only=True)
class Config:
    """The folders and measurements to check besides the machine."""

    data: str | None = None
    """Image folder to check."""
    out: str = "."
    """Folder for runs, checked for free space."""
    json: bool = False
    """Print JSON."""
    tune_attention: bool = False
    """First time every attention library here at the shapes of the paper's networks, and keep the results."""


@dataclass
class Findings:
    """Lines of the report, grouped, each with a verdict."""

    lines: list[tuple[str, str, str, Verdict]] = field(default_factory=list)

    def add(self, group: str, name: str, value: Any, verdict: Verdict = "ok") -> None:
        """One line."""
        self.lines.append((group, name, str(value), verdict))

    @property
    def exit_code(self) -> int:
        verdicts = {verdict for *_, verdict in self.lines}
        return 2 if "broken" in verdicts else 1 if "warning" in verdicts else 0


def run(config: Config) -> int:
    """Look, print, and return the exit code."""
    findings = Findings()
    if config.tune_attention:
        if _device() == "cpu":
            raise UserError("--tune_attention needs a GPU: on a CPU there is nothing that PyTorch does not choose well")
        tune_attention(model_shapes(torch.bfloat16), _device())
    for look in (look_at_machine, look_at_packages, look_at_ops, look_at_attention):
        look(findings)
    look_at_folders(findings, config)
    if config.json:
        keys = ("group", "name", "value", "verdict")
        print(json.dumps([dict(zip(keys, line, strict=True)) for line in findings.lines], indent=1))
    else:
        print_table(findings)
    return findings.exit_code


def look_at_machine(findings: Findings) -> None:
    """System, cores, memory, GPUs."""
    facts = environment()
    findings.add("machine", "system", f"{facts['platform']}, glibc {platform.libc_ver()[1] or 'unknown'}")
    findings.add("machine", "python", facts["python"])
    cores, threads = facts["cpu_cores"], facts["num_threads"]
    findings.add(
        "machine",
        "CPU",
        f"{cores} usable cores, {threads} torch threads, {facts['cpu_capability']}",
        "warning" if threads > cores else "ok",
    )
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    findings.add(
        "machine",
        "open files",
        f"{open_files} (ulimit -n; {MIN_OPEN_FILES} or more for large data sets)",
        "ok" if open_files >= MIN_OPEN_FILES else "warning",
    )
    shared = Path("/dev/shm")
    if shared.exists():
        findings.add("machine", "/dev/shm", f"{shutil.disk_usage(shared).free / GIB:.1f} GiB free")
    if not torch.cuda.is_available():
        build = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
        findings.add("machine", "GPU", f"none that PyTorch sees ({build})")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        findings.add(
            "machine",
            f"GPU {index}",
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{free / GIB:.0f} of {total / GIB:.0f} GiB free",
        )


def look_at_packages(findings: Findings) -> None:
    """Versions of the required packages and of the extras."""
    findings.add("packages", "sendvae_fast", __version__)
    for name, version in environment()["packages"].items():
        missing: Verdict = "broken" if name in REQUIRED_PACKAGES else "warning"
        findings.add("packages", name, version or "not installed", "ok" if version else missing)
    for name, purpose in OPTIONAL_PACKAGES.items():
        try:
            findings.add("packages", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            findings.add("packages", name, f"not installed (optional: {purpose})")
    findings.add("packages", "nvcc", shutil.which("nvcc") or "not found (needed only to build CUDA ops)")


def look_at_ops(findings: Findings) -> None:
    """The compiled libraries, and for every op its backend here and why the others cannot run."""
    module = library.host()
    if module is not None:
        facts = ", ".join(f"{key} {value}" for key, value in module.build_info().items() if value)
        findings.add("ops", "build", facts)
    device = _device()
    for op in dispatch.OPS:
        reasons = dispatch.available_backends(op)
        try:
            chosen = dispatch.chosen_backend(op, device)
        except UserError as error:
            findings.add("ops", op, error, "broken")
            continue
        unusable = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        usable = ", ".join(name for name, reason in reasons.items() if reason is None)
        slow = chosen == "reference"
        findings.add(
            "ops",
            op,
            f"uses {chosen} on {device} (usable: {usable}; not: {unusable or 'none'})",
            "warning" if slow else "ok",
        )


def look_at_attention(findings: Findings) -> None:
    """Which attention libraries can run here, and which was the fastest where they were measured."""
    device = torch.device(_device())
    for name, reason in available_attention(device).items():
        findings.add("attention", name, f"no: {reason}" if reason else f"takes {device} tensors")
    measurements = load(device)
    findings.add(
        "attention",
        "table",
        f"{len(measurements)} shapes measured in {table_path(device)}"
        if measurements
        else "none, so PyTorch chooses; sendvae doctor --tune_attention makes one",
    )
    for measurement in measurements:
        shape = measurement.shape
        kind = "training" if shape.training else "forward"
        sizes = "x".join(map(str, (shape.batch, shape.heads, shape.tokens, shape.head_dim)))
        times = sorted(measurement.times_us.items(), key=lambda item: item[1])
        text = ", ".join(f"{backend} {time:.0f} us" for backend, time in times)
        findings.add("attention", f"{kind} {sizes}", text)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def look_at_folders(findings: Findings, config: Config) -> None:
    """Room for runs, and the image folder."""
    out = Path(config.out).resolve()
    existing = next(path for path in (out, *out.parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    verdict: Verdict = "ok" if free_gib >= MIN_FREE_GIB else "warning"
    findings.add(
        "folders",
        "runs",
        f"{free_gib:.0f} GiB free at {existing}",
        verdict if os.access(existing, os.W_OK) else "broken",
    )
    if config.data is not None:
        try:
            catalog = Catalog.open(config.data)
            findings.add("folders", "data", f"{len(catalog)} images in {len(catalog.class_names)} classes")
        except UserError as error:
            findings.add("folders", "data", error, "broken")


def print_table(findings: Findings) -> None:
    """The findings for people."""
    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "broken": "[red]broken[/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    group_before = None
    for group, name, value, verdict in findings.lines:
        if group != group_before and group_before is not None:
            table.add_row()
        table.add_row(f"[bold]{group}[/]" if group != group_before else "", name, marks[verdict], escape(value))
        group_before = group
    Console().print(table)
