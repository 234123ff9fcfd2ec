"""The latent cache: the posterior of every image, computed once, so that stage 2 never encodes.

    latents_00000.safetensors ...   mean, std [n, C, H, W]; labels, sample_ids int64 [n]; with flips also mean_flip and
                                    std_flip, of the mirrored images
    cache.json                      its source, statistics, and every shard's size and sha256; where the autoencoder was

Mean and standard deviation are kept, not a sample, so that each epoch draws its own latents. Shard k holds the samples
k * shard_size ... in order, and carries the description of its source, so that a shard whose writing finished is kept
when the job is run again. `cache.json` comes last: a directory without it is unfinished.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_rows import LatentRows
from sendvae_fast.data.latents.shard_format import (
    CACHE_FILE,
    DTYPES,
    SCHEMA_VERSION,
    SHARD_KEY,
    SHARD_PATTERN,
    LatentSource,
    file_list_sha256,
    read_cache_file,
    shard_header,
)
from sendvae_fast.errors import UserError
from sendvae_fast.files import file_sha256, remove_unfinished, save_tensors, write_atomic
from sendvae_fast.reading import NotOfItsKind, count_in, reading


class LatentCacheWriter:
    """Writes a latent cache shard by shard; running it again goes on where it stopped.

    Raises:
        UserError: when the directory holds latents of another source (another autoencoder, other images, other
            storage). Nothing is changed then.
    """

    def __init__(self, directory: str | Path, source: LatentSource) -> None:
        self.directory, self.source = Path(directory), source
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.is_complete:
            source.check_same(read_cache_file(self.directory)["source"], self.directory / CACHE_FILE)
        for path in sorted(self.directory.iterdir()):
            header = shard_header(path) if SHARD_PATTERN.fullmatch(path.name) else None
            if header is not None:
                source.check_same(header["source"], path)

    @property
    def is_complete(self) -> bool:
        return (self.directory / CACHE_FILE).exists()

    def missing_shards(self) -> list[int]:
        """Shards that are missing or unreadable, and are to be written."""
        return [k for k in range(self.source.num_shards) if shard_header(self._shard_path(k)) is None]

    def write_shard(
        self, shard: int, mean: Tensor, std: Tensor, labels: Tensor, flipped: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Write mean, std [n, C, H, W] and labels int64 [n] of the samples of `shard`, whole or not at all.

        flipped: mean and std of the mirrored images, if the source has flips.

        Raises:
            UserError: when a mean or standard deviation is not finite: the autoencoder is broken.
        """
        start, stop = self.source.shard_range(shard)
        if mean.shape != std.shape or len(mean) != stop - start or len(labels) != stop - start:
            raise ValueError(
                f"shard {shard} takes {stop - start} samples, got mean {list(mean.shape)}, std {list(std.shape)}, "
                f"labels {list(labels.shape)}"
            )
        if self.source.flips != (flipped is not None):
            raise ValueError(f"the source has flips={self.source.flips}, but flipped is {type(flipped).__name__}")
        latents = {"mean": mean, "std": std}
        if flipped is not None:
            latents.update(zip(("mean_flip", "std_flip"), flipped, strict=True))
        finite = torch.stack([value.isfinite().flatten(1).all(1) for value in latents.values()]).all(0)
        if not finite.all():
            sample_id = start + int((~finite).nonzero()[0])
            raise UserError(
                f"the autoencoder's latent of sample {sample_id} is not finite; check its weights and precision"
            )
        dtype = DTYPES[self.source.dtype]
        tensors = {
            **{name: value.to(dtype).contiguous() for name, value in latents.items()},
            "labels": labels.to(torch.int64).contiguous(),
            "sample_ids": torch.arange(start, stop),
        }
        # One key only: safetensors writes several in random order, and the same latents should give the same file.
        note = {"source": asdict(self.source), "sums": _channel_sums(tensors["mean"], tensors["std"]).tolist()}
        save_tensors(self._shard_path(shard), tensors, {SHARD_KEY: json.dumps(note)})

    def finish(self, autoencoder: Path | None = None) -> "LatentCache":
        """Hash the shards, work out the statistics, write `cache.json` and open the cache.

        One process does this, after every shard is written.

        Args:
            autoencoder: where its weights lie, for whoever decodes the latents later.

        Raises:
            UserError: when shards are missing.
        """
        missing = self.missing_shards()
        if missing:
            raise UserError(
                f"the latent cache {self.directory} lacks {len(missing)} of {self.source.num_shards} shards; "
                "run the same command again to write them"
            )
        shards, sums = [], torch.zeros((), dtype=torch.float64)
        for k in range(self.source.num_shards):
            path = self._shard_path(k)
            header = shard_header(path)
            assert header is not None, f"{path} was there"
            sums = sums + header["sums"]
            shape = header["shape"]
            shards.append({"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
        count = self.source.num_samples * shape[1] * shape[2]
        latent_mean, mean_square, noise_variance = sums / count
        latent_std = (mean_square - latent_mean**2 + noise_variance).sqrt()
        note = {
            "schema_version": SCHEMA_VERSION,
            "source": asdict(self.source),
            "autoencoder": None if autoencoder is None else str(autoencoder.absolute()),
            "latent_shape": shape,
            "latent_mean": latent_mean.tolist(),
            "latent_std": latent_std.tolist(),
            "shards": shards,
        }
        remove_unfinished(self.directory)
        write_atomic(self.directory / CACHE_FILE, json.dumps(note, indent=1))
        return LatentCache.open(self.directory)

    def _shard_path(self, shard: int) -> Path:
        return self.directory / f"latents_{shard:05d}.safetensors"


class LatentCache:
    """A finished latent cache with random access; `LatentReader` reads a cache ahead of use in a schedule's order.

    `latent_mean` and `latent_std` (float32 [C]) are the statistics of *sampled* latents per channel: the mean of the
    means, and the root of the means' variance plus the mean posterior variance. They normalise latents for stage 2.
    `autoencoder` is where the weights lay that made them, None where that was not recorded.
    """

    def __init__(self, directory: Path, note: dict[str, Any], rows: LatentRows, labels: Tensor) -> None:
        self.directory, self.rows, self.labels = directory, rows, labels
        self.source = LatentSource(**note["source"])
        recorded = note.get("autoencoder")  # not in caches of earlier versions
        self.autoencoder = None if recorded is None else Path(recorded)
        self.latent_mean, self.latent_std = (
            torch.from_numpy(np.array(note[name], dtype=np.float64)).float() for name in ("latent_mean", "latent_std")
        )
        if self.latent_mean.shape != rows.shape[:1] or self.latent_std.shape != rows.shape[:1]:
            raise NotOfItsKind(f"latents of {rows.shape[0]} channels have as many means and stds")
        if not (self.latent_mean.isfinite().all() and self.latent_std.isfinite().all() and (self.latent_std > 0).all()):
            raise NotOfItsKind("a mean or std is not finite, or a std is not above 0")
        if not count_in(note["source"], "num_samples") == len(rows) == len(labels):
            raise NotOfItsKind(f"the shards hold {len(rows)} latents and {len(labels)} labels")

    def __len__(self) -> int:
        return self.source.num_samples

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        return self.rows.shape

    @classmethod
    def open(cls, directory: str | Path, verify_hashes: bool = False) -> "LatentCache":
        """Open a cache after checking that every shard is there and of its recorded size.

        Args:
            directory: where `LatentCacheWriter` wrote it.
            verify_hashes: also read every shard and compare its sha256.

        Raises:
            UserError: when the cache is missing, unfinished or of another version, or a shard is missing, truncated or
                changed; the message names it.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"the latent cache {directory} does not exist; make it with `sendvae cache-latents`")
        note = read_cache_file(directory)
        with reading(directory / CACHE_FILE, "remove it and run `sendvae cache-latents` again"):
            return cls._of_note(directory, note, verify_hashes)

    @classmethod
    def _of_note(cls, directory: Path, note: dict[str, Any], verify_hashes: bool) -> "LatentCache":
        variants = [("mean", "std"), ("mean_flip", "std_flip")][: 1 + bool(note["source"].get("flips", False))]
        paths, labels = [], []
        for shard in note["shards"]:
            path = directory / Path(shard["file"]).name
            again = f"remove it and {directory / CACHE_FILE}, and run `sendvae cache-latents` again"
            if not path.exists():
                raise UserError(
                    f"the latent shard {path} is missing; remove {directory / CACHE_FILE} and "
                    "run `sendvae cache-latents` again"
                )
            if path.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"the latent shard {path} has {path.stat().st_size} bytes instead of {shard['bytes']}; {again}"
                )
            if verify_hashes and file_sha256(path) != shard["sha256"]:
                raise UserError(f"the latent shard {path} has changed since it was written (sha256 differs); {again}")
            try:
                with safe_open(path, framework="pt") as file:
                    labels.append(file.get_tensor("labels"))
            except SafetensorError as error:
                raise UserError(f"the latent shard {path} cannot be read ({error}); {again}") from None
            paths.append(path)
        return cls(directory, note, LatentRows.of_files(paths, variants), torch.cat(labels))

    def check_catalog(self, catalog: Catalog, image_size: int) -> None:
        """Raise a UserError unless the cache holds the latents of exactly these images, at this size."""
        if file_list_sha256(catalog) != self.source.file_list_sha256 or image_size != self.source.image_size:
            raise UserError(
                f"the latent cache {self.directory} was made from {self.source.num_samples} images of "
                f"{self.source.image_size} px in {self.source.image_root}, not from these {len(catalog)} images of "
                f"{image_size} px in {catalog.root}; give the same images, or run `sendvae cache-latents` on these"
            )

    def load(self, ids: Tensor | np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and std [B, C, H, W] in the cache's dtype, and labels int64 [B], of the samples `ids` int64 [B].

        Raises:
            IndexError: for an id outside the cache.
        """
        ids = torch.as_tensor(ids)
        mean, std = self.rows.load(ids)
        return mean, std, self.labels[ids]


def _channel_sums(mean: Tensor, std: Tensor) -> Tensor:
    """Per channel: sum of the means, of their squares, and of the variances; float64 [3, C]."""
    mean, std = mean.double(), std.double()
    return torch.stack([value.sum((0, 2, 3)) for value in (mean, mean**2, std**2)])
