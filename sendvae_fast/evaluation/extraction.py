"""Features of many pictures, over any number of ranks, resumable: a file for every thousand pictures.

A file appears whole or not at all, so an interrupted evaluation goes on where it stopped and no rank waits long for
another. Pictures are never all in memory; their features are, where a metric needs them all (50,000 of 2048 numbers are
400 MB).

Shape letters: N pictures, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.features import FeatureNetwork, Features
from sendvae_fast.evaluation.frechet import FeatureStatistics
from sendvae_fast.evaluation.pictures import Pictures
from sendvae_fast.files import save_tensors
from sendvae_fast.progress import Progress

CHUNK = 1000
"""Pictures per file."""


class FeatureSet:
    """The features of a set of pictures, in parts on the CPU or in files."""

    def __init__(self, parts: list[Features] | list[Path]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Features]:
        """The parts, in the order of pictures."""
        return (_read(part) if isinstance(part, Path) else part for part in self._parts)

    @cached_property
    def pooled(self) -> Tensor:
        """float32 [N, D]."""
        return torch.cat([part.pooled for part in self])

    @cached_property
    def logits(self) -> Tensor | None:
        """float32 [N, 1008], None where the network has none."""
        parts = [part.logits for part in self if part.logits is not None]
        return torch.cat(parts) if parts else None

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Of the pooled features."""
        return _statistics(part.pooled for part in self)

    @cached_property
    def spatial_statistics(self) -> FeatureStatistics | None:
        """Of the spatial features; None where the network has none."""
        if next(iter(self)).spatial is None:
            return None
        return _statistics(part.spatial for part in self if part.spatial is not None)


def extract(
    pictures: Pictures,
    network: FeatureNetwork,
    batch_size: int,
    distributed: Distributed | None = None,
    folder: Path | None = None,
    title: str = "features",
) -> FeatureSet:
    """The features of all pictures. Collective where `folder` is given; without it every rank does everything.

    Args:
        pictures: at least one.
        network: on the device to work on.
        batch_size: pictures at once.
        distributed: the ranks that share the work.
        folder: where files are kept, by network and pictures, on a file system that all ranks see.
        title: of the progress.

    Raises:
        UserError: there is no picture, one cannot be read, features are not finite, or the disk is full.
    """
    ranks = distributed or Distributed()
    ranges = [(start, min(start + CHUNK, len(pictures))) for start in range(0, len(pictures), CHUNK)]
    if not ranges:
        raise UserError(f"{pictures.origin.path} has no pictures to take features of")
    if folder is None:
        with Progress(title, len(pictures), unit="picture") as progress:
            return FeatureSet(
                [_compute(pictures, network, batch_size, start, stop, progress) for start, stop in ranges]
            )
    files = [folder / _name(pictures, network) / f"features_{number:05d}.safetensors" for number in range(len(ranges))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    missing = ranks.broadcast_object(missing)  # before any rank writes
    own = missing[ranks.rank :: ranks.world_size]
    with Progress(title, sum(ranges[n][1] - ranges[n][0] for n in own), unit="picture") as progress:
        for number in own:
            start, stop = ranges[number]
            _write(files[number], _compute(pictures, network, batch_size, start, stop, progress))
    ranks.barrier()
    return FeatureSet(files)


@torch.no_grad()
def _compute(
    pictures: Pictures, network: FeatureNetwork, batch_size: int, start: int, stop: int, progress: Progress
) -> Features:
    device, parts = next(network.parameters()).device, []
    for images in pictures.batches(batch_size, start, stop):
        features = network(images.to(device, non_blocking=True))
        parts.append([None if part is None else part.cpu() for part in features])
        progress.advance(len(images))
    columns = zip(*parts, strict=True)
    joined = [None if column[0] is None else torch.cat(column) for column in columns]
    found = Features._make(joined)
    if not all(part.isfinite().all() for part in found if part is not None):
        raise UserError(
            f"features of pictures {start} to {stop - 1} of {pictures.origin.path} are not finite: the weights "
            f"{network.origin.weights} are broken"
        )
    return found


def _name(pictures: Pictures, network: FeatureNetwork) -> str:
    """Of the folder of these pictures' features by this network."""
    of_network = f"{network.origin.name} {network.protocol} {network.origin.sha256[:8]}"
    of_pictures = f"{pictures.origin.image_size}px {pictures.origin.sha256[:16]}"
    return f"{of_network} {of_pictures}".replace(" ", "_")


def _write(file: Path, features: Features) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, {key: value for key, value in features._asdict().items() if value is not None})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file} ({error}): make room and run the same command again to go on") from error


def _read(file: Path) -> Features:
    try:
        return Features(**load_file(file))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it and run the same command again") from error


def _statistics(parts: Iterator[Tensor]) -> FeatureStatistics:
    statistics = None
    for part in parts:
        statistics = statistics or FeatureStatistics(part.shape[1])
        statistics.update(part)
    assert statistics is not None
    return statistics
