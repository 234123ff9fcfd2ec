"""The latent cache of a data set: every image encoded once, between the two stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.latent_cache import LatentCache, LatentCacheWriter, LatentSource
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_model_range
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.progress import Progress
from sendvae_fast.train.settings import CacheConfig


def cache(config: CacheConfig, distributed: Distributed) -> LatentCache:
    """Fill the cache on all ranks and open it. Safe to run again: what is there is kept. Collective.

    Raises:
        UserError: the folder holds latents of another autoencoder or of other images, or the autoencoder does not take
            pictures of this size.
    """
    with distributed.all_or_none():
        catalog = Catalog.open(config.data)
        weights = resolve_weights(config.autoencoder)
        autoencoder = load_autoencoder(weights).autoencoder
        autoencoder.latent_shape(config.image_size)  # raises for a size that it does not take
    source = LatentSource.of_catalog(
        catalog,
        config.image_size,
        weights_sha256(autoencoder.state_dict()),
        dataclasses.asdict(autoencoder.config),
        dtype=config.dtype,
        shard_size=config.shard_size,
        flips=config.flips,
    )
    writer = LatentCacheWriter(config.out, source)
    if not writer.is_complete:
        autoencoder = autoencoder.to(distributed.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - as documented

        def encode(images: Tensor) -> tuple[Tensor, Tensor]:
            posterior = autoencoder.posterior(to_model_range(images.to(distributed.device)))
            return posterior.mean, posterior.std

        cache_latents(
            encode,
            ImageLoader(catalog, config.image_size, config.loader, distributed.device),
            writer,
            batch_size=config.batch_size,
            rank=distributed.rank,
            world_size=distributed.world_size,
        )
        distributed.barrier()
        if distributed.is_main:
            writer.finish(weights)
        distributed.barrier()
    return LatentCache.open(config.out)


def cache_latents(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    loader: ImageLoader,
    writer: LatentCacheWriter,
    *,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Encode what is missing of this rank's shards; then, with all ranks done, one of them calls `writer.finish()`.

    Args:
        encode: uint8 [B, 3, S, S] on the CPU to posterior (mean, std) [B, C, H, W] on any device.
        loader: of the images that `writer.source` describes.
        writer: of the cache to fill.
        batch_size: images per call of `encode`.
        rank: of this process; ranks take shards in turn.
        world_size: number of ranks.

    Raises:
        UserError: when an image cannot be read, or the autoencoder's output is not finite.
    """
    flips = writer.source.flips
    ranges = {k: writer.source.shard_range(k) for k in writer.missing_shards() if k % world_size == rank}
    num_images = sum(stop - start for start, stop in ranges.values())
    with torch.inference_mode(), Progress("caching latents", num_images, unit="image") as progress:
        for shard, (start, stop) in ranges.items():
            parts: list[tuple[Tensor, ...]] = []
            for batch in loader.in_order(batch_size, start=start, stop=stop):
                latents = encode(batch.images)
                if flips:
                    latents = *latents, *encode(batch.images.flip(-1))
                parts.append((batch.labels, *(value.float().cpu() for value in latents)))
                progress.advance(len(batch.ids))
            labels, mean, std, *flipped = (torch.cat(column) for column in zip(*parts, strict=True))
            writer.write_shard(shard, mean, std, labels, (flipped[0], flipped[1]) if flips else None)
