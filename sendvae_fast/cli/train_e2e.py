"""REPA-E: train an autoencoder and the generator on its latents together.

    sendvae train e2e --config e2e/va_vae --run=runs/e2e --data.root=imagenet/train

The run is an autoencoder (`--autoencoder=runs/e2e`) and a generator (`--generator=runs/e2e`) to the other verbs.
Running the same command again resumes it. On SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 it saves and exits with 75.
"""

from sendvae_fast.cli.training import train_or_look
from sendvae_fast.train.e2e.settings import E2ETrainConfig

Config = E2ETrainConfig
MAIN_OPTIONS = (
    "data.root",
    "data.global_batch",
    "init_from",
    "discriminator_from",
    "generator.preset",
    "generator.patch_size",
    "repa.autoencoder_weight",
    "repa.foundation.name",
    "repa.foundation.weights",
    "loss.perceptual.weights",
    "engine.name",
    "engine.zero_stage",
    "engine.precision",
    "loop.num_steps",
    "loop.save_every",
    "seed",
    "dry_run",
)


def run(config: E2ETrainConfig) -> int:
    """Train, or with --dry_run look at what training would need; returns the exit code."""
    from sendvae_fast.train.e2e.stage import train_e2e

    return train_or_look(train_e2e, config)
