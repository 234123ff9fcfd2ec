"""Draw pictures from a trained SiT (its EMA weights) and write them as PNG files and an npz.

    sendvae sample --generator=runs/xl --autoencoder=runs/send --out=samples/xl --num_samples=50000

A picture depends on (seed, id) alone: not on batch size, ranks or restarts. Run again to go on where it stopped.
"""

from sendvae_fast.engine.distributed import current_distributed
from sendvae_fast.sampling.job import SampleConfig, npz_path, sample_to_folder

Config = SampleConfig


def run(config: SampleConfig) -> None:
    """Draw what is missing and say where it is."""
    folder = sample_to_folder(config)
    if current_distributed().is_main:
        print(f"{folder.root}: {config.num_samples} pictures" + (f", {npz_path(config.out)}" if config.npz else ""))
