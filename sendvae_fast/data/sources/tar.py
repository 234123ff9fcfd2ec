"""WebDataset tar shards: a picture and, beside it under the same key, its label in `.cls` or `.json`."""

import itertools
import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sendvae_fast.data.decode import UnreadableImage, failure_reason
from sendvae_fast.data.limits import check_size
from sendvae_fast.data.sources.base import Listing, ShardedSource, common_folder, index_classes, sample_order
from sendvae_fast.data.sources.folder import EXTENSIONS
from sendvae_fast.data.sources.tar_headers import TarMember, read_tar_headers
from sendvae_fast.errors import UserError

MAX_OPEN_SHARDS = 128
MAX_LABEL_BYTES = 2**20
HEADER_THREADS = 8
CLASS_SHARD = re.compile(r"n\d{8}")
"""ImageNet's own shards: one per class, named by its wnid."""
LABEL_OPTIONS = "cls, json:FIELD, folder, shard or none"


class TarSource(ShardedSource):
    """Members of plain tars, read in place."""

    kind = "tar"

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._descriptors: dict[int, _Descriptor] = {}
        self._first_seen: dict[int, tuple[int, int]] = {}  # size and time of change, by file
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        size, offset = int(self.size[index]), int(self.offset[index])
        try:
            check_size(size)
            shard = self._open(int(self.file[index]))
            data = os.pread(shard.number, size, offset)
            self._check_unchanged(int(self.file[index]), shard)
            if len(data) < size:
                raise ValueError(f"the shard ends too early, at byte {os.fstat(shard.number).st_size}")
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):  # a file server that was away knows nothing of what was open
                with self._lock:
                    self._descriptors.pop(int(self.file[index]), None)
            raise UnreadableImage(self.locate(index), failure_reason(error)) from error
        return data

    def locate(self, index: int) -> str:
        return f"{self.shard_path(index)} ({self.names[index]!r} at byte {self.offset[index]})"

    def _check_unchanged(self, file: int, shard: "_Descriptor") -> None:
        """ValueError where another shard lies there now: its bytes would be some other sample's."""
        status = os.fstat(shard.number)
        now = status.st_size, status.st_mtime_ns
        if self._first_seen.setdefault(file, now) != now:
            raise ValueError("the shard has changed since it was first read")

    def _open(self, file: int) -> "_Descriptor":
        """The open shard number `file`; the ones used longest ago are closed when their last reader lets go."""
        with self._lock:
            shard = self._descriptors.pop(file, None) or _Descriptor(self.root / self.files[file])
            self._descriptors[file] = shard
            if len(self._descriptors) > MAX_OPEN_SHARDS:
                del self._descriptors[next(iter(self._descriptors))]
            return shard


class _Descriptor:
    """A file that is open for reading as long as this object is referenced."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@dataclass(frozen=True)
class _Sample:
    """A picture in shard number `shard` and what lies beside it: extension to member."""

    shard: int
    picture: TarMember
    beside: dict[str, TarMember]


def list_tars(shards: Sequence[Path], label: str | None = None) -> Listing:
    """List the pictures in tar shards by their headers.

    Args:
        shards: paths of plain (not compressed) tars.
        label: where the class of a sample comes from: "cls" or "json:FIELD" (a member beside the picture), "folder"
            (the picture's folder in the tar), "shard" (its shard's name), "none" (one class). By default the first of
            these that there is: `.cls` members, folders, shards named by ImageNet's wnids.

    Raises:
        UserError: when a shard cannot be opened or is compressed, there are no pictures, or a label is missing.
    """
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        contents = list(pool.map(read_tar_headers, shards))
    samples = [sample for shard, tar in enumerate(contents) for sample in _samples(shard, tar.members)]
    damage = tuple(tar.damage for tar in contents if tar.damage)
    if not samples:
        what = f"{len(shards)} tar shards from {shards[0]} on"
        inner = sum(member.name.endswith(".tar") for tar in contents for member in tar.members)
        hint = f"they hold {inner} further tars: unpack those first" if inner else f"expected {', '.join(EXTENSIONS)}"
        raise UserError(f"there are no images in {what}; {damage[0] if damage else hint}")
    root = common_folder(shards)
    labels, class_names = index_classes(_classes(samples, shards, label, root), str(root))
    names = [sample.picture.name for sample in samples]
    source = TarSource(
        root,
        names,
        [path.relative_to(root).as_posix() for path in shards],
        np.array([sample.shard for sample in samples], np.int32),
        np.array([sample.picture.offset for sample in samples], np.int64),
        np.array([sample.picture.size for sample in samples], np.int64),
    )
    order = sample_order(labels, names)
    passed_over = tuple(line for tar in contents for line in tar.passed_over)
    return Listing(source.take(order), labels[order], class_names, damage, passed_over)


def _samples(shard: int, members: Sequence[TarMember]) -> list[_Sample]:
    """The pictures of a shard. A key is a name up to the first dot after its folder, as WebDataset has it.

    A picture whose extension has dots of its own (`x.mask.png`) counts only where there is no other one of its key.
    """
    by_key: dict[str, dict[str, TarMember]] = {}
    for member in members:
        folder, base = os.path.split(member.name)
        if not base.startswith("."):
            key, _, extension = base.partition(".")
            by_key.setdefault(os.path.join(folder, key), {})[extension.lower()] = member
    found = []
    for beside in by_key.values():
        pictures = [extension for extension in beside if f".{extension}".endswith(EXTENSIONS)]
        plain = [extension for extension in pictures if "." not in extension]
        found += [_Sample(shard, beside[extension], beside) for extension in plain or pictures]
    return found


def _classes(
    samples: Sequence[_Sample], shards: Sequence[Path], label: str | None, root: Path
) -> list[str] | list[int]:
    """The class of every sample, by name or number."""
    label = label or _default_label(samples, shards)
    kind, _, field = label.partition(":")
    if kind == "folder":
        return [_folder_of(sample, shards[sample.shard]) for sample in samples]
    if kind == "shard":
        return [shards[sample.shard].name.partition(".")[0] for sample in samples]
    if kind == "none":
        return [root.resolve().name] * len(samples)
    if kind == "cls" or (kind == "json" and field):
        classes = []
        for shard, group in itertools.groupby(samples, key=lambda sample: sample.shard):
            descriptor = _Descriptor(shards[shard])
            classes += [_label_beside(sample, shards[shard], descriptor, kind, field) for sample in group]
        return classes
    raise UserError(f"label={label!r} is not a place for labels in tar shards; give {LABEL_OPTIONS}")


def _default_label(samples: Sequence[_Sample], shards: Sequence[Path]) -> str:
    if any("cls" in sample.beside for sample in samples):
        return "cls"
    if any("/" in sample.picture.name for sample in samples):
        return "folder"
    return "shard" if all(CLASS_SHARD.fullmatch(path.stem) for path in shards) else "none"


def _folder_of(sample: _Sample, shard: Path) -> str:
    folder = os.path.basename(os.path.dirname(sample.picture.name))
    if not folder:
        raise UserError(f"{shard}: {sample.picture.name!r} lies in no folder; give another label: {LABEL_OPTIONS}")
    return folder


def _label_beside(sample: _Sample, shard: Path, descriptor: _Descriptor, extension: str, field: str) -> str | int:
    """The class of a picture by the `.cls` or `.json` member beside it."""
    where = f"{shard}: {sample.picture.name!r}"
    member = sample.beside.get(extension)
    if member is None:
        raise UserError(f"{where} has no .{extension} beside it; add it or give another label: {LABEL_OPTIONS}")
    text = os.pread(descriptor.number, min(member.size, MAX_LABEL_BYTES), member.offset)
    try:
        value = text.decode().strip() if extension == "cls" else json.loads(text)[field]
        if isinstance(value, str) and value.lstrip("-").isdigit():
            value = int(value)
    except (ValueError, KeyError, TypeError, RecursionError):
        value = None
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        place = f"the .{extension} beside it" + (f", field {field!r}" if field else "")
        raise UserError(f"{where}: {place} holds no label; correct it or give another label: {LABEL_OPTIONS}")
    return value
