"""Stage 1: fine-tune (or train) an autoencoder, its noised latents aligned with a frozen foundation model.

    sendvae train vae --config vae/send_vae_f16d32 --data.root=imagenet/train --run=runs/send

Running the same command again resumes the run. On SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 it saves and
exits with 75.
"""

from sendvae_fast.cli.training import train_or_look
from sendvae_fast.train.vae.settings import VAETrainConfig

Config = VAETrainConfig
MAIN_OPTIONS = (
    "data.root",
    "data.image_size",
    "data.global_batch",
    "init_from",
    "discriminator_from",
    "alignment.method",
    "alignment.weight",
    "alignment.foundation.name",
    "alignment.foundation.weights",
    "loss.perceptual.weights",
    "loss.gan_weight",
    "optimizer.learning_rate",
    "engine.name",
    "engine.zero_stage",
    "engine.precision",
    "loop.num_steps",
    "loop.save_every",
    "seed",
    "dry_run",
)


def run(config: VAETrainConfig) -> int:
    """Train, or with --dry_run look at what training would need; returns the exit code."""
    from sendvae_fast.train.vae.stage import train_vae

    return train_or_look(train_vae, config)
