"""Checkpoints that are either complete or absent.

A checkpoint is a directory `step_00001000` with a `manifest.json` that lists every other file with its size and sha256.
It is written under another name and renamed when all of it is on the disk, so a kill at any instant leaves the
checkpoints before it as they were. No other file points to the newest: the directories themselves are searched.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.snapshot import UnsoundStateError, Write
from sendvae_fast.errors import UserError
from sendvae_fast.files import file_sha256, fsync_path, write_atomic
from sendvae_fast.reading import NotOfItsKind, count_in, read_json, reading
from sendvae_fast.version import __version__

SCHEMA = 1
MANIFEST = "manifest.json"
FINAL_NAME = re.compile(r"step_(\d{8,})")
STAGED_NAME = re.compile(r"step_\d{8,}\.tmp-[0-9a-f]+")


class CorruptCheckpointError(Exception):
    """A checkpoint is not what its manifest says; the message names the file."""


class Checkpointer:
    """Saves and finds the checkpoints of one run. Every rank makes one and calls it at the same steps.

    Args:
        directory: where the `step_*` directories are; on a file system all ranks see.
        distributed: the ranks that save.
        keep: number of newest checkpoints kept.
        config_hash: fingerprint of the settings a checkpoint belongs to; see `run.config_hash`.
        keep_every: steps between milestones, which are kept beside the newest ones; None for none.
    """

    def __init__(
        self,
        directory: Path,
        distributed: Distributed,
        keep: int = 2,
        config_hash: str = "",
        *,
        keep_every: int | None = None,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}: at least 1 checkpoint must be kept")
        self.directory, self.keep, self.config_hash = Path(directory), keep, config_hash
        self.keep_every = keep_every
        self._distributed = distributed

    def save(self, step: int, write: Write) -> Path | None:
        """Write one checkpoint. Collective.

        `write(path)` runs on every rank and puts that rank's files (names no other rank uses) under `path`, by
        `sendvae_fast.files`, which flushes each: what a rank wrote, that rank's machine must flush, and no other need.
        No collectives in it: a full disk on one rank would leave another waiting.

        Returns the checkpoint's directory; or None, with a warning, when the disk failed (full, read-only, I/O error)
        or the state is unsound: training may go on and the checkpoints before stay as they were. A valid checkpoint of
        the same step is kept and nothing is written.

        Raises:
            Exception: whatever else `write` raises; RuntimeError on the other ranks.
        """
        ranks = self._distributed
        final = self.directory / f"step_{step:08d}"
        if ranks.broadcast_object(ranks.is_main and _is_valid(final)):
            return final
        staged = ranks.broadcast_object(self.directory / f"{final.name}.tmp-{uuid.uuid4().hex}")

        phases = (lambda: self._write_share(staged, write), lambda: self._finish(staged, final, step))
        try:
            return final if all(self._all_succeed(step, phase) for phase in phases) else None
        finally:
            if ranks.is_main:  # what a failed save wrote would keep a full disk full; a whole one has its name by now
                shutil.rmtree(staged, ignore_errors=True)

    def load_latest(self, before: int | None = None) -> tuple[int, Path] | None:
        """Step and directory of the newest checkpoint whose every byte is as written, or None. Collective.

        A damaged one is passed over with a warning that names the file. `before`: only those of earlier steps.

        Raises:
            UserError: the newest sound checkpoint was written with another configuration; or there are checkpoints and
                all are damaged.
        """
        ranks = self._distributed
        found, problem = ranks.broadcast_object(self._find_latest(before) if ranks.is_main else None)
        if problem is not None:
            raise UserError(problem)
        return found

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps. Collective."""
        if self._distributed.is_main:
            for number, directory in _newest_first(self.directory):
                if number > step:
                    _set_aside(directory)
            self._remove_set_aside()
        self._distributed.barrier()

    def _write_share(self, staged: Path, write: Write) -> None:
        staged.mkdir(parents=True, exist_ok=True)
        write(staged)

    def _finish(self, staged: Path, final: Path, step: int) -> None:
        """Rank 0, once every rank's files are on the disk: manifest, rename, verify, purge."""
        if not self._distributed.is_main:
            return
        world_size = self._distributed.world_size
        write_manifest(staged, step=step, config_hash=self.config_hash, world_size=world_size)
        for directory in [staged, *(path for path in staged.rglob("*") if path.is_dir())]:
            fsync_path(directory)
        if final.exists():
            _set_aside(final)  # a damaged checkpoint of this step
        os.rename(staged, final)
        fsync_path(self.directory)
        try:
            verify(final)
        except CorruptCheckpointError as error:
            raise OSError(f"it does not read back as written: {error}") from error
        self._purge(step)

    def _purge(self, step: int) -> None:
        """Remove all but milestones and the newest checkpoints up to `step`, and what killed saves left behind."""
        older = [(number, directory) for number, directory in _newest_first(self.directory) if number <= step]
        for number, directory in older[self.keep :]:
            if not is_milestone(number, self.keep_every):
                _set_aside(directory)  # first: a kill halfway leaves no half of a checkpoint under a checkpoint's name
        self._remove_set_aside()

    def _remove_set_aside(self) -> None:
        for directory in [path for path in self.directory.iterdir() if STAGED_NAME.fullmatch(path.name)]:
            # A checkpoint that cannot be removed costs disk space but does not end the training.
            shutil.rmtree(directory, onerror=lambda _, path, error: _warn(f"cannot remove {path}: {error[1]}"))

    def _find_latest(self, before: int | None) -> tuple[tuple[int, Path] | None, str | None]:
        """The newest sound checkpoint as rank 0 found it, or else an error for the user."""
        found = [(step, path) for step, path in _newest_first(self.directory) if before is None or step < before]
        for step, directory in found:
            try:
                manifest = verify(directory)
            except CorruptCheckpointError as error:
                _warn(f"passing over damaged checkpoint {directory}: {error}")
                continue
            if manifest["config_hash"] != self.config_hash:
                return None, (
                    f"checkpoint {directory} was written with other settings (config hash {manifest['config_hash']}, "
                    f"this command has {self.config_hash}): use the settings in "
                    f"{self.directory.parent / 'config.yaml'}, or start a new run directory"
                )
            return (step, directory), None
        if found:
            return None, (
                f"every checkpoint in {self.directory} is damaged ({len(found)} of {len(found)}): put back a sound "
                "copy of one, or remove that folder to start again from step 0"
            )
        return None, None

    def _all_succeed(self, step: int, work: Callable[[], None]) -> bool:
        """Run `work` on every rank; True when all did it, False when a disk failed somewhere, or state is unsound."""
        failure: Exception | None = None
        try:
            work()
        except Exception as error:
            failure = error
        can_go_on = isinstance(failure, (OSError, SafetensorError, UnsoundStateError))
        outcomes = self._distributed.gather_objects((failure is None, can_go_on, str(failure)))
        if failure is not None and not can_go_on:
            raise failure
        for rank, (succeeded, goes_on, message) in enumerate(outcomes):
            if succeeded:
                continue
            if not goes_on:
                raise RuntimeError(f"rank {rank} failed to save the checkpoint of step {step}: {message}")
            if self._distributed.is_main:
                _warn(f"the checkpoint of step {step} was not saved (rank {rank}: {message}); training goes on")
            return False
        return True


def _set_aside(directory: Path) -> None:
    """Give a checkpoint a name that the next purge removes."""
    try:
        os.rename(directory, directory.with_name(f"{directory.name}.tmp-{uuid.uuid4().hex}"))
    except OSError as error:
        _warn(f"cannot rename {directory}: {error.strerror}")


def is_milestone(step: int, keep_every: int | None) -> bool:
    """Whether the checkpoint of a step is kept for good."""
    return keep_every is not None and step % keep_every == 0


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest sound checkpoint under `directory`, whatever configuration wrote it; None where there is none."""
    return next((path for _, path in _newest_first(Path(directory)) if _is_valid(path)), None)


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


def _newest_first(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    matches = [(FINAL_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _is_valid(directory: Path) -> bool:
    try:
        verify(directory)
    except CorruptCheckpointError:
        return False
    return True


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _seal(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
