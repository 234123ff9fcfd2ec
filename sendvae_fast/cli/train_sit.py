"""Stage 2: train a SiT flow transformer with REPA on cached latents.

    sendvae train sit --config configs/sit/xl_1.yaml --latents=latents/send --data.root=imagenet/train --run=runs/xl

Running the same command again resumes the run. On a signal (SIGTERM, SIGINT, SIGUSR1) it saves and exits with 75.
"""

from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.sit.stage import train_sit

Config = SiTTrainConfig
run = train_sit
