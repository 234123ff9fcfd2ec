"""Write an autoencoder or a generator in the layout of another program.

    sendvae convert runs/send --to=diffusers --out=send-vae-hf
    sendvae convert runs/send --to=diffusers --out=send-vae-hf --push=USER/NAME
    sendvae convert vavae-imagenet256-f16d32-dinov2.pt --stats=latents_stats.pt --to=sendvae --out=vavae
    sendvae convert sit-ldm-e2e-vavae.pt --to=generator --out=e2e-sit
    sendvae convert runs/xl --to=repa-e --out=xl-repa-e
    sendvae convert DiT-XL-2-256x256.pt --dit --scaling_factor=0.18215 --to=generator --out=dit

SOURCE is one of our folders or runs, a diffusers AutoencoderKL folder, a checkpoint file in the LDM layout, bare or
inside a training checkpoint (SD-VAE, VA-VAE, REPA-E), or a generator's checkpoint (SiT, REPA, REPA-E, LightningDiT).
No code in it is run, and an existing OUT is never overwritten. Weights stay the same bit by bit, except two layers
between our or REPA's generators and SiT's or LightningDiT's, whose time runs the other way. SiT's predicted sigma,
which no sampler uses, is dropped. DiT's checkpoints look like SiT's but are no flows: do not convert them.
"""

from pathlib import Path

from sendvae_fast.cli.convert_settings import ConvertConfig
from sendvae_fast.errors import UserError
from sendvae_fast.hub import check_push, push_folder

Config = ConvertConfig
POSITIONAL = "source"


def run(config: ConvertConfig) -> None:
    """Read, check and write."""
    from sendvae_fast.cli.conversion import convert

    if config.push is not None:
        if config.to != "diffusers":
            raise UserError(f"--push is for --to=diffusers, whose layout the hub knows, not for --to={config.to}")
        check_push(config.push)
    what, statistics_origin = convert(config)
    print(f"{config.out}: {what}, {config.to} layout; latent statistics from {statistics_origin}")
    if config.push is not None:
        print(f"pushed: {push_folder(Path(config.out), config.push)}")
