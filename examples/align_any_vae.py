"""Align any autoencoder with any model of timm, as Send-VAE does: its noised latents learn to predict patch features.

    python examples/align_any_vae.py vit_small_patch14_dinov2 dinov2.safetensors

Without arguments the model is a small one with random weights, which is enough to see the loss fall.
"""

import sys

import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from sendvae_fast.nn import NoiseInjection, PatchAlignment
from sendvae_fast.ops import philox

model, weights = sys.argv[1:] or ("vit_small_patch32_224", "")
torch.manual_seed(0)

vae = AutoencoderKL(block_out_channels=[16], norm_num_groups=8, mid_block_add_attention=False)  # does not downsample
teacher = timm.create_model(model, checkpoint_path=weights).eval()
grid, width = teacher.patch_embed.grid_size[0], teacher.num_features
noise = NoiseInjection(vae.config.latent_channels)
align = PatchAlignment(vae.config.latent_channels, grid, width, patch_size=2, width=192, num_heads=3)
optimizer = torch.optim.AdamW([*vae.parameters(), *align.parameters()], lr=1e-3)
images = torch.rand(4, 3, grid * 2, grid * 2) * 2 - 1
with torch.no_grad():
    mean, std = (torch.tensor(teacher.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    resized = F.interpolate(images, teacher.patch_embed.img_size, mode="bicubic")
    target = teacher.forward_features((resized / 2 + 0.5 - mean) / std)[:, teacher.num_prefix_tokens :]
for step in range(10):
    posterior = vae.encode(images).latent_dist
    latents = noise(posterior.mean, posterior.logvar, philox.make_key(0, step), torch.arange(len(images)))
    alignment = align(latents.z_t, target)
    reconstruction = F.l1_loss(vae.decode(latents.z).sample, images)
    optimizer.zero_grad()
    (reconstruction + alignment).backward()
    optimizer.step()
    print(f"step {step}: reconstruction {reconstruction.item():.3f}, alignment {alignment.item():.3f}")
