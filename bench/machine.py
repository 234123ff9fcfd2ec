"""The facts that a measurement depends on: the machine, the versions, the state of the sources."""

import importlib.util
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
COMMIT_VARIABLE = "SENDVAE_COMMIT"
# Files that the benchmarks themselves write are no part of the sources measured.
GENERATED = (
    "bench/results",
    "docs/performance.md",
    "bench/evidence/results",
    "docs/evidence.md",
    "docs/images",
    "README.md",
)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """The machine a benchmark on `device` ran on, as JSON."""
    cores = len(os.sched_getaffinity(0))
    facts = {"cpu": cpu_model(), "cores": cores, "load_1min": round(os.getloadavg()[0], 2)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "capability": f"{properties.major}{properties.minor}"}
    facts["name"] = facts.get("gpu") or f"{facts['cpu']} {cores} cores"
    facts["cache_bytes"] = last_level_cache_bytes(device)
    return facts


def version_facts() -> dict[str, Any]:
    """Versions that a timing depends on, as JSON."""
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda,
    }  # fmt: skip


def source_facts() -> dict[str, Any]:
    """The commit of this checkout and whether tracked files differ from it; None where that is not known.

    A copy without its git directory takes the commit from the environment variable SENDVAE_COMMIT.
    """
    commit, clean = commit_of(ROOT, *(f":!{path}" for path in GENERATED))
    return {"commit": commit or os.environ.get(COMMIT_VARIABLE), "clean": clean, "date": _today()}


def commit_of(folder: Path, *but: str) -> tuple[str | None, bool | None]:
    """The commit of the git checkout that `folder` is, and whether tracked files are as in it; None for no checkout.

    but: what is left out of the comparison, as git's pathspecs.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != folder.resolve():
        return None, None
    return commit, _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", *but) == ""


def slug(name: str) -> str:
    """A machine's name as part of a file name."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the cache nearest to the device's memory; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [_cache_bytes(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 * 2**20)


def _cache_bytes(path: Path) -> int:
    text = path.read_text().strip()
    return int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _today() -> str:
    return time.strftime("%Y-%m-%d")
