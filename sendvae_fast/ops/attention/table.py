"""The measured table from which `attention` picks: a JSON file for each device and set of library versions.

    ~/.cache/sendvae_fast/attention-<device>-<versions>.json      ($XDG_CACHE_HOME in place of ~/.cache, if set)

`tuning` writes it. Without it, or for a shape that is not in it, PyTorch chooses.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import warnings
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic
from sendvae_fast.ops.attention.backends import BACKENDS
from sendvae_fast.reading import NotOfItsKind, read_json, reading

SCHEMA = 1
PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers")


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention of one size: q, k, v [batch, heads, tokens, head_dim]."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    training: bool = False
    """Whether the backward pass counts too."""

    @property
    def batch_class(self) -> int:
        """Batches up to the same power of two, and above half of it, share a measurement."""
        return 1 << (self.batch - 1).bit_length()


@dataclass(frozen=True)
class Measurement:
    """The measurements of one shape."""

    shape: AttentionShape
    times_us: dict[str, float] = field(default_factory=dict)
    """Median time of each backend that ran."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why the others did not."""
    untraceable: tuple[str, ...] = ()
    """Backends that ran, but not inside torch.compile(fullgraph=True)."""

    def fastest(self, *, traced: bool) -> str:
        """The fastest backend, traced by torch.compile or not; "sdpa" if none ran."""
        times = {name: t for name, t in self.times_us.items() if not (traced and name in self.untraceable)}
        return min(times, key=times.__getitem__, default="sdpa")


class Choice(NamedTuple):
    """A row of the table as `attention` reads it: what to take for a shape, eager and traced by torch.compile."""

    tokens: int
    head_dim: int
    heads: int
    batch_class: int
    dtype: torch.dtype
    training: bool
    eager: str
    traced: str


@cache
def choices(device_type: str, device_index: int | None) -> tuple[Choice, ...]:
    """The table of a device, empty if nothing was measured; read once, and again when `save` has changed it."""
    return tuple(
        Choice(
            s.tokens, s.head_dim, s.heads, s.batch_class, s.dtype, s.training,
            measurement.fastest(traced=False), measurement.fastest(traced=True),
        )
        for measurement in load(torch.device(device_type, device_index))  # pyright: ignore[reportArgumentType] - None is taken
        for s in (measurement.shape,)
    )  # fmt: skip


def table_path(device: torch.device) -> Path:
    """Where the table of a device is, whether or not there is one."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache_home).expanduser() / "sendvae_fast" / f"attention-{slug}-{digest}.json"


def load(device: torch.device) -> list[Measurement]:
    """The measurements of a device. A file that is broken or of another machine is ignored, with a warning."""
    path = table_path(device)
    if not path.exists():
        return []
    remedy = "it is ignored; delete it or measure again with sendvae doctor --tune_attention"
    try:
        content = read_json(path, remedy)
        with reading(path, remedy):
            if {key: content[key] for key in _header(device)} != _header(device):
                raise NotOfItsKind("it is of another device, other library versions or another format")
            return [_from_json(entry) for entry in content["entries"]]
    except UserError as error:
        warnings.warn(f"attention table {error}", stacklevel=2)
        return []


def save(device: torch.device, measurements: list[Measurement]) -> Path:
    """Add measurements to the table of a device, in place of older ones of the same shapes; the file is replaced whole.

    Raises:
        UserError: it cannot be written.
    """
    path = table_path(device)
    merged = {choice_key(m.shape): m for m in (*load(device), *measurements)}
    content = {**_header(device), "entries": [_to_json(m) for m in merged.values()]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): set XDG_CACHE_HOME to a folder you own") from error
    choices.cache_clear()
    return path


def device_name(device: torch.device) -> str:
    """A GPU's product name; for a CPU its architecture and the instruction set that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@cache
def versions() -> dict[str, str]:
    """The versions that a measurement depends on."""
    found = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _header(device: torch.device) -> dict[str, Any]:
    return {"schema": SCHEMA, "device": device_name(device), "versions": versions()}


def choice_key(shape: AttentionShape) -> tuple:
    """The key of a row of the table."""
    return shape.batch_class, shape.heads, shape.tokens, shape.head_dim, shape.dtype, shape.training


def _to_json(measurement: Measurement) -> dict[str, Any]:
    entry = asdict(measurement)
    entry["shape"]["dtype"] = str(measurement.shape.dtype).removeprefix("torch.")
    return entry


def _from_json(entry: dict[str, Any]) -> Measurement:
    shape, times = dict(entry["shape"]), dict(entry["times_us"])
    dtype = getattr(torch, shape.pop("dtype"))
    numbers = [*(shape[name] for name in ("batch", "heads", "tokens", "head_dim")), *times.values()]
    if not isinstance(dtype, torch.dtype) or not all(isinstance(x, int | float) and x > 0 for x in numbers):
        raise NotOfItsKind(f"no measurement: {entry}")
    if times.keys() - BACKENDS:
        raise NotOfItsKind(f"unknown backends: {', '.join(times.keys() - BACKENDS)}")
    return Measurement(
        AttentionShape(**shape, dtype=dtype), times, dict(entry["failures"]), tuple(entry["untraceable"])
    )
