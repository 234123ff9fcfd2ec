"""Features of pictures as half-precision files on disk, made on any number of ranks, and gone on with after a kill."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.pictures import Pictures
from sendvae_fast.evaluation.probing.rows import Rows, share
from sendvae_fast.files import write_atomic
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.progress import Progress
from sendvae_fast.reading import count_in, read_json, reading, reading_zip

NOTE_EVERY_BATCHES = 50
"""Batches of pictures after which a file of features says how far it is."""

Encode = Callable[[Tensor], Tensor]
"""uint8 pictures [B, 3, S, S] on any device to features [B, ...]."""


def posterior_means(autoencoder: ImageAutoencoder) -> Encode:
    """Pictures to posterior means [B, C, H, W]."""

    def encode(images: Tensor) -> Tensor:
        return autoencoder.posterior(to_model_range(images)).mean

    return encode


@contextmanager
def feature_folder(given: str | None, distributed: Distributed) -> Iterator[Path]:
    """The folder that is given, else a temporary one that all ranks of this machine share."""
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="sendvae-features-") as own:
        yield Path(distributed.broadcast_object(own))
        distributed.barrier()


@torch.no_grad()
def encoded_rows(
    encode: Encode, identity: str, pictures: Pictures, folder: Path, batch_size: int, distributed: Distributed
) -> Rows:
    """The features of pictures as a float16 file in `folder`, made now or, where it is there already, taken.

    Every rank encodes its share. A call that was interrupted goes on where it was, on the same number of ranks; a file
    that was cut off or is of another shape is made again.

    Args:
        encode: pictures to features; runs on the distributed's device.
        identity: what tells these features from others of the same pictures, such as the hash of the weights.
        pictures: what is encoded.
        folder: on a disk that all ranks see; holds any number of such files.
        batch_size: pictures at once.
        distributed: the ranks.

    Raises:
        UserError: a feature is not finite in half precision, or the disk is full.
    """
    key = f"{identity} {pictures.origin.sha256} {pictures.origin.image_size} {len(pictures)}"
    path = folder / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    finished = path.with_suffix(".finished")
    note = path.with_suffix(f".rank{distributed.rank}of{distributed.world_size}")
    start, stop = share(len(pictures), distributed)
    is_sound = _holds_rows_of(path, len(pictures))
    if not distributed.broadcast_object(finished.is_file() and is_sound):
        done = _done(note, stop - start) if is_sound else 0
        if not any(distributed.gather_objects(done > 0)):
            _make(path, encode, pictures, distributed)
        distributed.barrier()
        file = np.load(path, mmap_mode="r+")
        with Progress("encoding", stop - start, unit="picture", start=done) as progress:
            for number, images in enumerate(pictures.batches(batch_size, start + done, stop), start=1):
                features = encode(images.to(distributed.device)).flatten(1).to(torch.float16)
                if not features.isfinite().all():
                    raise UserError("latents are not finite in half precision; the autoencoder's checkpoint is broken")
                file[start + done : start + done + len(images)] = features.cpu().numpy()
                done += len(images)
                if number % NOTE_EVERY_BATCHES == 0 or done == stop - start:
                    file.flush()
                    write_atomic(note, json.dumps({"done": done}))
                progress.advance(len(images))
        distributed.barrier()
        if distributed.is_main:
            finished.touch()
        distributed.barrier()
    return Rows(np.load(path, mmap_mode="r"), distributed.device)


def _holds_rows_of(path: Path, num_pictures: int) -> bool:
    """Whether a file has features of so many pictures, as `_make` makes them."""
    try:
        with reading_zip(path, "it is made again"):
            rows = np.load(path, mmap_mode="r")
            return (
                rows.ndim == 2
                and len(rows) == num_pictures
                and (rows.dtype, rows.flags.c_contiguous) == (np.float16, True)
                and rows.offset + rows.nbytes == path.stat().st_size
            )
    except UserError:
        return False


def _done(note: Path, most: int) -> int:
    """Pictures that this rank has encoded before, as its note says; 0 where that is no number up to `most`."""
    try:
        with reading(note, "the pictures are encoded again"):
            done = count_in(read_json(note, ""), "done")
    except UserError:
        return 0
    return done if done <= most else 0


def _make(path: Path, encode: Encode, pictures: Pictures, distributed: Distributed) -> None:
    """An empty file of the right shape, by rank 0; how many features there are the first picture tells."""
    if not distributed.is_main:
        return
    first = next(iter(pictures.batches(1, 0, 1)))
    dim = encode(first.to(distributed.device)).flatten(1).shape[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for note in (*path.parent.glob(f"{path.stem}.rank*"), path.with_suffix(".finished")):
            note.unlink(missing_ok=True)  # of another number of ranks, or of a file that was damaged
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(len(pictures), dim)).flush()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give a --cache on a disk with room") from error
