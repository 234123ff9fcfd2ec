"""What `sendvae doctor` says of GPUs, and of versions that do not fit together."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess

import torch
from torch.cuda.nccl import version as nccl_version

from sendvae_fast.cli.findings import Findings

GIB = 2**30
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major version of Linux drivers by the major version of CUDA that they can run (CUDA's release notes)."""
QUERY = "driver_version,persistence_mode,clocks.sm,clocks.max.sm,name"


def look_at_gpus(findings: Findings) -> None:
    """Driver, GPUs with their clocks, the libraries that PyTorch brings, and whether all of them fit together."""
    rows = ask_driver()
    built = f"torch {torch.__version__}, built for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs")
    if rows is None and not torch.cuda.is_available():
        findings.add("GPU", "driver", f"none, so everything runs on the CPU ({built})")
        return
    if rows:
        _look_at_driver(findings, rows[0][0], built)
    for index, (_, persistence, clock, most, name) in enumerate(rows or []):
        slow = persistence.lower().startswith("dis")
        hint = "; persistence mode is off, so the first call waits for the driver: nvidia-smi -pm 1" if slow else ""
        words = f"{name}, {clock} of {most}{hint}"
        findings.add("GPU", f"nvidia-smi {index}", words, "warning" if slow else "ok")
    if not torch.cuda.is_available():
        return
    findings.add("GPU", "NCCL", ".".join(map(str, nccl_version())))
    findings.add("GPU", "cuDNN", torch.backends.cudnn.version())
    architectures = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
        words = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        if runs_on(properties.major, properties.minor, architectures):
            findings.add("GPU", f"GPU {index}", words, "ok")
        else:
            remedy = f"{built}, has no code for it ({', '.join(architectures)}); install a torch that has"
            findings.add("GPU", f"GPU {index}", f"{words}: {remedy}", "broken")


def _look_at_driver(findings: Findings, driver: str, built: str) -> None:
    cuda = torch.version.cuda
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda is None:
        remedy = "a GPU is here that it cannot use; install torch for CUDA (pytorch.org)"
        findings.add("GPU", "driver", f"{driver}, but {built}: {remedy}", "broken")
        return
    major = int(cuda.split(".")[0])
    least = LEAST_DRIVER.get(major)
    if least is not None and int(driver.split(".", maxsplit=1)[0]) < least:
        remedy = f"CUDA {major} needs driver {least} or newer: update the driver, or install torch for an older CUDA"
        findings.add("GPU", "driver", f"{driver}, but {built}: {remedy}", "broken")
    elif torch.cuda.is_available():
        findings.add("GPU", "driver", f"{driver}; {built}", "ok")
    elif hidden is not None:
        findings.add("GPU", "driver", f"{driver}; CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU", "warning")
    else:
        findings.add("GPU", "driver", f"{driver}; {built}, sees no GPU: nvidia-smi may say why", "broken")


def ask_driver() -> list[list[str]] | None:
    """A row of `QUERY` for each GPU that the driver has; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[word.strip() for word in line.split(",", 4)] for line in said.splitlines() if line.strip()]
    return [row for row in rows if len(row) == 5] or None


def runs_on(major: int, minor: int, architectures: list[str]) -> bool:
    """Whether binaries of these architectures run on a GPU: one of its major version, or older PTX ("compute_90")."""
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if found is None:
            continue
        kind, own = found[1], (int(found[2]), int(found[3]))
        if (kind == "sm" and own[0] == major and own[1] <= minor) or (kind == "compute" and own <= (major, minor)):
            return True
    return False


def look_at_pairs(findings: Findings) -> None:
    """Packages that are compiled for one version of torch: another is an undefined symbol at their import."""
    for package in ("torchvision", "torchaudio"):
        try:
            requirements = importlib.metadata.requires(package) or []
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = next((found[1] for line in requirements if (found := re.match(r"torch\s*==\s*([\w.+]+)", line))), None)
        installed = torch.__version__.split("+")[0]
        if wanted is None or wanted.split("+")[0] == installed:
            findings.add("packages", f"{package} and torch", f"{version} fits torch {installed}", "ok")
        else:
            remedy = f"pip install {package}=={version} torch=={wanted}, or a {package} for torch {installed}"
            words = f"{version} is for torch {wanted}, not {installed}: {remedy}"
            findings.add("packages", f"{package} and torch", words, "broken")
