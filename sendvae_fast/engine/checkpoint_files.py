"""What a checkpoint is on the disk: its names, its manifest, and whether it is sound. Torch is not needed to look."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from sendvae_fast.errors import UserError
from sendvae_fast.files import file_sha256, write_atomic
from sendvae_fast.reading import NotOfItsKind, count_in, read_json, reading
from sendvae_fast.version import __version__

SCHEMA = 1
MANIFEST = "manifest.json"
FINAL_NAME = re.compile(r"step_(\d{8,})")
STAGED_NAME = re.compile(r"step_\d{8,}\.tmp-[0-9a-f]+")


class CorruptCheckpointError(Exception):
    """A checkpoint is not what its manifest says; the message names the file."""


def is_milestone(step: int, keep_every: int | None) -> bool:
    """Whether the checkpoint of a step is kept for good."""
    return keep_every is not None and step % keep_every == 0


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest sound checkpoint under `directory`, whatever configuration wrote it; None where there is none."""
    return next((path for _, path in newest_first(Path(directory)) if is_valid(path)), None)


def write_manifest(directory: Path, *, step: int, config_hash: str, world_size: int) -> None:
    """List every file under `directory` in its manifest, which is sealed with its own sha256."""
    paths = _files(directory)
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(file_sha256, paths))
    manifest = {
        "schema": SCHEMA,
        "version": __version__,
        "step": step,
        "config_hash": config_hash,
        "world_size": world_size,
        "files": {
            path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, sums, strict=True)
        },
    }
    manifest["seal"] = _seal(manifest)
    write_atomic(directory / MANIFEST, json.dumps(manifest, indent=1))


def verify(directory: Path) -> dict:
    """The manifest of a checkpoint, after comparing every file with it.

    Raises:
        CorruptCheckpointError: a file is missing or differs, or the manifest itself does.
    """
    try:
        manifest = read_json(directory / MANIFEST, "use another checkpoint")
        seal = manifest.pop("seal", None)
        if seal != _seal(manifest):
            raise CorruptCheckpointError(f"{MANIFEST} was changed after it was written")
        with reading(directory / MANIFEST, "use another checkpoint"):
            _check_entries(manifest)
    except UserError as error:
        raise CorruptCheckpointError(str(error)) from error
    if f"step_{manifest['step']:08d}" != directory.name:
        raise CorruptCheckpointError(f"{MANIFEST} is that of step {manifest['step']}")

    def check(item: tuple[str, dict]) -> str | None:
        name, wanted = item
        path = directory / name
        try:
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
            return None if file_sha256(path) == wanted["sha256"] else f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        for problem in pool.map(check, manifest["files"].items()):
            if problem is not None:
                raise CorruptCheckpointError(problem)
    return manifest


def _check_entries(manifest: dict) -> None:
    """Raise what `reading` names where a manifest, sealed by whomever, is none of ours or leads out of its folder."""
    count_in(manifest, "step")
    if not isinstance(manifest["config_hash"], str):
        raise NotOfItsKind("config_hash is no text")
    for name, entry in manifest["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise NotOfItsKind(f"a file of a checkpoint cannot be {name!r:.80}")
        count_in(entry, "bytes")
        if not isinstance(entry["sha256"], str):
            raise NotOfItsKind(f"the sha256 of {name!r:.80} is no text")


def newest_first(directory: Path) -> list[tuple[int, Path]]:
    """The steps and folders of all checkpoints in a directory, sound or not; none where it is not there."""
    if not directory.is_dir():
        return []
    matches = [(FINAL_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def is_valid(directory: Path) -> bool:
    """Whether a checkpoint is what its manifest says."""
    try:
        verify(directory)
    except CorruptCheckpointError:
        return False
    return True


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _seal(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
