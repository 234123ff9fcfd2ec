"""Report this machine's hardware and packages, the backend of each op, and possible improvements.

    sendvae doctor
    sendvae doctor --json --data=imagenet/train --out=runs
    torchrun --nproc-per-node 8 -m sendvae_fast doctor --network      # the speed of all-reduces
    sendvae doctor --tune_attention      # measure the attention libraries at the paper's shapes, for later runs

Exits 0 when all is well, 1 with warnings, 2 when something is broken.
"""

import importlib.metadata
import importlib.util
import platform
import shutil
from dataclasses import dataclass

import torch

from sendvae_fast.cli.doctor_gpu import look_at_gpus, look_at_pairs
from sendvae_fast.cli.doctor_network import measure_network
from sendvae_fast.cli.doctor_system import look_at_cores, look_at_limits, look_at_network, look_at_run_folder
from sendvae_fast.cli.findings import Findings, Verdict
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.run import environment
from sendvae_fast.errors import UserError
from sendvae_fast.ops import available_attention, dispatch, library, tune_attention
from sendvae_fast.ops.attention.table import load, table_path
from sendvae_fast.ops.attention.tuning import model_shapes
from sendvae_fast.version import __version__, package_commit

REQUIRED_PACKAGES = ("torch", "numpy", "pillow", "safetensors")
OPTIONAL_PACKAGES = {
    "nvidia-dali-cuda130": "GPU image decoding",
    "flash-attn": "flash attention 2",
    "flash-attn-4": "flash attention 4",
    "xformers": "attention kernels",
    "tensorboard": "training curves",
}


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
    network: bool = False
    """Only time all-reduces of several sizes over the ranks of torchrun or srun, in GB/s."""


def run(config: Config) -> int:
    """Look, print, and return the exit code."""
    if config.network:
        return measure_network()
    findings = Findings()
    if config.tune_attention:
        if _device() == "cpu":
            raise UserError("--tune_attention needs a GPU: on a CPU there is nothing that PyTorch does not choose well")
        tune_attention(model_shapes(torch.bfloat16), _device())
    for look in (look_at_machine, look_at_gpus, look_at_network, look_at_packages, look_at_pairs):
        look(findings)
    for look in (look_at_ops, look_at_attention):
        look(findings)
    look_at_run_folder(findings, config.out)
    look_at_data(findings, config.data)
    if config.json:
        findings.print_json()
    else:
        findings.print_table()
    return findings.exit_code


def look_at_machine(findings: Findings) -> None:
    """System, cores and limits."""
    facts = environment()
    findings.add("machine", "system", f"{facts['platform']}, glibc {platform.libc_ver()[1] or 'unknown'}")
    findings.add("machine", "python", facts["python"])
    findings.add("machine", "CPU", facts["cpu_capability"])
    look_at_cores(findings, facts["num_threads"])
    look_at_limits(findings)


def look_at_packages(findings: Findings) -> None:
    """Versions of the required packages and of the extras."""
    findings.add("packages", "sendvae_fast", f"{__version__}, commit {package_commit() or 'unknown'}")
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
    if (stale := library.stale()) is not None:
        findings.add("ops", "compiled ops", stale, "broken")
        return
    missing = library.status()["cpu"]
    if missing is not None:
        findings.add("ops", "compiled ops", f"{missing}; Triton, on a GPU, or PyTorch runs instead", "warning")
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
        findings.add("attention", name, reason or f"takes {device} tensors", "note" if reason else "ok")
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


def look_at_data(findings: Findings, data: str | None) -> None:
    """The image folder."""
    if data is None:
        return
    try:
        catalog = Catalog.open(data)
        findings.add("folders", "data", f"{len(catalog)} images in {len(catalog.class_names)} classes", "ok")
    except UserError as error:
        findings.add("folders", "data", error, "broken")
