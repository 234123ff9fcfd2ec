"""What `sendvae doctor` says of cores, limits, file systems and network interfaces."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import tempfile
from pathlib import Path

from sendvae_fast.cli.findings import Findings, Verdict

GIB = 2**30
MIN_OPEN_FILES = 4096
MIN_FREE_GIB = 10.0
MIN_SHARED_GIB = 0.25
"""NCCL puts its buffers between the GPUs of a node there; containers have 64 MiB unless told otherwise."""
SHORT_LIVED = {"tmpfs": "in memory, gone at the next start", "overlay": "of a container, gone with it"}
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs", "wekafs", "cifs"}


def look_at_cores(findings: Findings, num_threads: int) -> None:
    """Cores that this process may use, by affinity and by its control group, beside PyTorch's threads."""
    cores, quota = len(os.sched_getaffinity(0)), cgroup_cores()
    usable = cores if quota is None else min(cores, quota)
    words = f"{cores} by affinity" + ("" if quota is None else f", {quota:g} by control group")
    if num_threads > usable:
        words += f", but {num_threads} torch threads: set OMP_NUM_THREADS={max(1, int(usable))}"
    findings.add("machine", "cores", words, "warning" if num_threads > usable else "ok")


def cgroup_cores(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The fewest cores' worth of time that this process's control group or one around it has; None without a limit."""
    limits = []
    for line in _text(proc).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / path.lstrip("/") if not controllers else root / "cpu" / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            quota, period = [*_text(place / "cpu.max").split(), "", ""][:2]  # version 2
            if not quota:
                quota, period = _text(place / "cpu.cfs_quota_us").strip(), _text(place / "cpu.cfs_period_us").strip()
            if quota.isdecimal() and period.isdecimal() and int(period) > 0:
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def look_at_limits(findings: Findings, shared: Path = Path("/dev/shm")) -> None:
    """Open files and shared memory."""
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = open_files < MIN_OPEN_FILES
    hint = f": raise it to {MIN_OPEN_FILES} or more (ulimit -n) for data sets of many shards" if few else ""
    findings.add("machine", "open files", f"{open_files}{hint}", "warning" if few else "ok")
    if shared.exists():
        free = shutil.disk_usage(shared).free / GIB
        small = free < MIN_SHARED_GIB
        hint = (
            ": too little for NCCL between GPUs; start the container with --ipc=host or --shm-size=8g" if small else ""
        )
        findings.add("machine", str(shared), f"{free:.2g} GiB free{hint}", "warning" if small else "ok")


def look_at_run_folder(findings: Findings, out: str) -> None:
    """Room, file system and locks of the folder for runs."""
    path = Path(out).resolve()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    verdict: Verdict = "ok" if free_gib >= MIN_FREE_GIB else "warning"
    if not os.access(existing, os.W_OK):
        findings.add("folders", "runs", f"{existing} cannot be written", "broken")
        return
    findings.add("folders", "runs", f"{free_gib:.0f} GiB free at {existing}", verdict)
    kind = file_system(existing)
    if kind in SHORT_LIVED:
        findings.add("folders", "file system", f"{kind}: {SHORT_LIVED[kind]}; keep runs elsewhere", "warning")
    else:
        place = ", seen by other nodes if they mount it" if kind in NETWORK_FILE_SYSTEMS else ", of this node alone"
        findings.add("folders", "file system", f"{kind}{place if kind != 'unknown' else ''}")
    if has_locks(existing):
        findings.add("folders", "locks", "work: a second job in a run is refused at once", "ok")
    else:
        hint = "none on this file system (Lustre: mount it with flock): a run's owner shows itself every 20 s instead"
        findings.add("folders", "locks", hint, "warning")


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that a path is on: "ext4", "nfs4", "lustre"."""
    best, kind = "", "unknown"
    for line in _text(mounts).splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = words[1].replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, words[2]
    return kind


def has_locks(folder: Path) -> bool:
    """Whether files in a folder can be locked."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def look_at_network(
    findings: Findings, net: Path = Path("/sys/class/net"), ib: Path = Path("/sys/class/infiniband")
) -> None:
    """Interfaces that are up, and the one that NCCL would take for its first contact."""
    names = sorted(path.name for path in net.iterdir()) if net.exists() else []
    up = [name for name in names if _text(net / name / "operstate").strip() in ("up", "unknown")]
    cards = sorted(path.name for path in ib.iterdir()) if ib.exists() else []
    findings.add("network", "interfaces", ", ".join(f"{name}{_speed(net / name)}" for name in up) or "none is up")
    findings.add("network", "InfiniBand", ", ".join(cards) or "none, so nodes talk over TCP")
    chosen = os.environ.get("NCCL_SOCKET_IFNAME")
    if chosen is None:
        words = f"{nccl_interface(up) or 'none'} (NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name another)"
        findings.add("network", "NCCL takes", words)
        return
    fits = matching(chosen, names)
    if fits:
        findings.add("network", "NCCL takes", f"{', '.join(fits)}, by NCCL_SOCKET_IFNAME={chosen}", "ok")
    else:
        words = f"nothing: NCCL_SOCKET_IFNAME={chosen}, but there are {', '.join(names)}"
        findings.add("network", "NCCL takes", words, "broken")


def nccl_interface(names: list[str]) -> str | None:
    """The interface that NCCL takes by itself: InfiniBand's, else any but docker's and loopback, else these."""
    ranks = [("ib",), ("docker", "lo", "virbr"), ("docker",), ("lo",)]
    for number, prefixes in enumerate(ranks):
        found = [name for name in names if name.startswith(prefixes) is not (number == 1)]
        if found:
            return found[0]
    return None


def matching(pattern: str, names: list[str]) -> list[str]:
    """Interfaces that NCCL_SOCKET_IFNAME means: prefixes, "=" for whole names, "^" for all but them."""
    inverted, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    words = [word for word in pattern.lstrip("^=").split(",") if word]
    return [
        name
        for name in names
        if any(name == word if exact else name.startswith(word) for word in words) is not inverted
    ]


def _speed(folder: Path) -> str:
    text = _text(folder / "speed").strip()
    return f" ({int(text) / 1000:g} Gbit/s)" if text.isdecimal() else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
