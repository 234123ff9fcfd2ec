"""Stage 1: fine-tune (or train) an autoencoder, its noised latents aligned with a frozen foundation model.

    sendvae train vae --config configs/vae/send_vae_f16d32.yaml --data.root=imagenet/train --run=runs/send

Running the same command again resumes the run. On a signal (SIGTERM, SIGINT, SIGUSR1) it saves and exits with 75.
"""

from sendvae_fast.train.vae.settings import VAETrainConfig
from sendvae_fast.train.vae.stage import train_vae

Config = VAETrainConfig
run = train_vae
