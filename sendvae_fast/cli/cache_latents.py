"""Encode pictures once into latent shards (posterior mean and standard deviation) for stage 2.

    sendvae cache-latents --autoencoder=runs/send --data=imagenet/train --out=latents/send

Resumable; refuses to mix autoencoders, crops or pictures.
"""

from sendvae_fast.train.settings import CacheConfig

Config = CacheConfig
MAIN_OPTIONS = (
    "image_size",
    "batch_size",
    "dtype",
    "flips",
)


def run(config: CacheConfig) -> None:
    """Fill the cache and say what is in it."""
    from sendvae_fast.engine.distributed import init_distributed
    from sendvae_fast.train.cache_latents import cache

    distributed = init_distributed()
    latents = cache(config, distributed)
    channels, height, width = latents.latent_shape
    if distributed.is_main:
        print(f"{config.out}: {len(latents)} latents of {channels} x {height} x {width}")
