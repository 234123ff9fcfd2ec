"""Stage 2: train a SiT flow transformer with REPA on cached latents.

    sendvae train sit --config sit/xl_1 --latents=latents/send --data.root=imagenet/train --run=runs/xl

Running the same command again resumes the run. On SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 it saves and
exits with 75.
"""

from sendvae_fast.cli.training import train_or_look
from sendvae_fast.train.sit.settings import SiTTrainConfig

Config = SiTTrainConfig
MAIN_OPTIONS = (
    "data.root",
    "data.global_batch",
    "autoencoder",
    "init_from",
    "generator.preset",
    "generator.patch_size",
    "repa.weight",
    "repa.foundation.name",
    "repa.foundation.weights",
    "optimizer.learning_rate",
    "engine.name",
    "engine.zero_stage",
    "engine.precision",
    "loop.num_steps",
    "loop.save_every",
    "seed",
    "dry_run",
)


def run(config: SiTTrainConfig) -> int:
    """Train, or with --dry_run look at what training would need; returns the exit code."""
    from sendvae_fast.train.sit.stage import train_sit

    return train_or_look(train_sit, config)
