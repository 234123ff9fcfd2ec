"""Features of sets of pictures. Pictures are never all in memory; features are, where a metric needs them all.

Shape letters: N pictures, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.chunks import Chunks, Columns, compute_chunks, folder_name
from sendvae_fast.evaluation.features import FeatureNetwork
from sendvae_fast.evaluation.frechet import FeatureStatistics
from sendvae_fast.evaluation.pictures import Pictures
from sendvae_fast.progress import Progress


class FeatureSet:
    """The features of a set of pictures. chunks: columns as in `Features`, the pooled ones under the name `pooled`."""

    def __init__(self, chunks: Chunks, pooled: str = "pooled") -> None:
        self._chunks, self._name = chunks, pooled

    @cached_property
    def pooled(self) -> Tensor:
        """float32 [N, D]."""
        return self._chunks[self._name]

    @cached_property
    def logits(self) -> Tensor | None:
        """float32 [N, 1008], None where the network has none."""
        return self._chunks.column("logits")

    @cached_property
    def spatial(self) -> Tensor | None:
        """float32 [N, 2023], None where the network has none."""
        return self._chunks.column("spatial")

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Of the pooled features."""
        return statistics_of(part[self._name] for part in self._chunks)

    @cached_property
    def spatial_statistics(self) -> FeatureStatistics | None:
        """Of the spatial features; None where the network has none."""
        if "spatial" not in next(iter(self._chunks)):
            return None
        return statistics_of(part["spatial"] for part in self._chunks)


def extract(
    pictures: Pictures,
    network: FeatureNetwork,
    batch_size: int,
    distributed: Distributed | None = None,
    folder: Path | None = None,
    title: str = "features",
    chunk: int | None = None,
) -> FeatureSet:
    """The features of all pictures. Collective where `folder` is given; without it every rank does everything.

    Args:
        pictures: at least one.
        network: on the device to work on.
        batch_size: pictures at once.
        distributed: the ranks that share the work.
        folder: where files are kept, by network and pictures, on a file system that all ranks see.
        title: of the progress.
        chunk: pictures per file, as in `compute_chunks`.

    Raises:
        UserError: there is no picture, one cannot be read, features are not finite, or the disk is full.
    """
    if not len(pictures):
        raise UserError(f"{pictures.origin.path} has no pictures to take features of")
    if folder is not None:
        own, theirs = pictures.origin, network.origin
        folder /= folder_name(
            theirs.name, network.protocol, theirs.sha256[:8], f"{own.image_size}px", pictures.identity[:16]
        )
    with Progress(title, len(pictures), unit="picture") as progress:

        def compute(start: int, stop: int) -> Columns:
            device, parts = next(network.parameters()).device, []
            for images in pictures.batches(batch_size, start, stop):
                parts.append(network(images.to(device, non_blocking=True)))
                progress.advance(len(images))
            return finite_columns(join(parts), pictures, start, stop, network)

        return FeatureSet(compute_chunks(len(pictures), torch.no_grad()(compute), distributed, folder, chunk))


def join(parts: list) -> Columns:
    """NamedTuples of tensors or None, one per batch, as columns on the CPU."""
    fields = parts[0]._fields
    return {
        name: torch.cat([getattr(part, name) for part in parts]).cpu()
        for name in fields
        if getattr(parts[0], name) is not None
    }


def finite_columns(columns: Columns, pictures: Pictures, start: int, stop: int, network: FeatureNetwork) -> Columns:
    """The columns. Raises UserError if one is not finite."""
    if not all(column.isfinite().all() for column in columns.values()):
        raise UserError(
            f"features of pictures {start} to {stop - 1} of {pictures.origin.path} are not finite: the weights "
            f"{network.origin.weights} are broken, or the autoencoder's"
        )
    return columns


def statistics_of(parts: Iterator[Tensor]) -> FeatureStatistics:
    """Mean and covariance of features [n, D] in parts, of which there is at least one."""
    statistics = None
    for part in parts:
        statistics = statistics or FeatureStatistics(part.shape[1])
        statistics.update(part)
    assert statistics is not None
    return statistics
