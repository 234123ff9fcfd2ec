"""Checkpoints that are either complete or absent.

A checkpoint is a directory `step_00001000` with a `manifest.json` that lists every other file with its size and sha256.
It is written under another name and renamed when all of it is on the disk, so a kill at any instant leaves the
checkpoints before it as they were. No other file points to the newest: the directories themselves are searched.
"""

import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sendvae_fast.engine.checkpoint_files import (
    STAGED_NAME,
    CorruptCheckpointError,
    is_milestone,
    is_valid,
    newest_first,
    verify,
    write_manifest,
)
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.snapshot import UnsoundStateError, Write
from sendvae_fast.errors import UserError
from sendvae_fast.files import fsync_path


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
        if ranks.broadcast_object(ranks.is_main and is_valid(final)):
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
            for number, directory in newest_first(self.directory):
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
        older = [(number, directory) for number, directory in newest_first(self.directory) if number <= step]
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
        found = [(step, path) for step, path in newest_first(self.directory) if before is None or step < before]
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


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
