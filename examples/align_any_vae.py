"""Align any autoencoder with any model of timm, as Send-VAE does: its noised latents learn to predict patch features.

    python examples/align_any_vae.py --model=vit_small_patch14_dinov2 --weights=dinov2.safetensors

Without --weights the model's weights are random, which is enough to see the loss fall.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from sendvae_fast.nn import NoiseInjection, PatchAlignment
from sendvae_fast.ops import philox

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--weights", default="", help="a local file of the model's weights")
parser.add_argument("--grid", type=int, default=4, help="patches per side, for both")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

torch.manual_seed(0)
vae = AutoencoderKL(
    block_out_channels=[16, 32], norm_num_groups=8, down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
)  # fmt: skip
patch = timm.create_model(args.model).patch_embed.patch_size[0]
teacher = timm.create_model(args.model, img_size=args.grid * patch, checkpoint_path=args.weights).eval()
noise = NoiseInjection(vae.config.latent_channels)
align = PatchAlignment(
    vae.config.latent_channels, args.grid, teacher.num_features, patch_size=4, width=192, num_heads=3
)
optimizer = torch.optim.AdamW([*vae.parameters(), *align.parameters()], lr=1e-3)

images = torch.rand(8, 3, args.grid * 8, args.grid * 8) * 2 - 1  # 8: downsampling 2 by tokens of 4 x 4 latents
with torch.no_grad():
    mean, std = (torch.tensor(teacher.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    resized = F.interpolate(images, args.grid * patch, mode="bicubic")
    target = teacher.forward_features((resized / 2 + 0.5 - mean) / std)[:, teacher.num_prefix_tokens :]
for step in range(args.steps):
    posterior = vae.encode(images).latent_dist
    latents = noise(posterior.mean, posterior.logvar, philox.make_key(0, step), torch.arange(len(images)))
    alignment = align(latents.z_t, target)
    reconstruction = F.l1_loss(vae.decode(latents.z).sample, images)
    optimizer.zero_grad()
    (reconstruction + alignment).backward()
    optimizer.step()
    print(f"step {step}: reconstruction {reconstruction.item():.3f}, alignment {alignment.item():.3f}")
