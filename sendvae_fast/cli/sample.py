"""Draw pictures from a trained SiT (its EMA weights) and write them as PNG files and, with --npz, one npz.

    sendvae sample --generator=runs/xl --autoencoder=runs/send --out=samples/xl --num_samples=50000

On several ranks: torchrun --nproc-per-node 8 -m -- sendvae_fast sample ... A picture's noise and label are functions of
(seed, id) alone, so ranks, batch size and restarts change it by no more than the rounding of matrix products.
Run the same command again to go on where it stopped; more --num_samples add to what is there.
"""

from sendvae_fast.sampling.settings import SampleConfig

Config = SampleConfig
MAIN_OPTIONS = (
    "num_samples",
    "batch_size",
    "guidance_scale",
    "guidance_interval",
    "labels",
    "sampler.kind",
    "sampler.num_steps",
    "npz",
    "precision",
    "seed",
)


def run(config: SampleConfig) -> None:
    """Draw the missing pictures and print their folder."""
    from sendvae_fast.engine.distributed import init_distributed
    from sendvae_fast.sampling.sample_to_folder import npz_path, sample_to_folder

    distributed = init_distributed()
    folder = sample_to_folder(config, distributed)
    if distributed.is_main:
        print(f"{folder.root}: {config.num_samples} pictures" + (f", {npz_path(config.out)}" if config.npz else ""))
