"""Train somebody else's autoencoder with the fused GroupNorm and SiLU: what a step gains, and what changes.

    python examples/fused_vae_training.py --size=64 --channels 64 128 256

Every step is taken by the network as it is and by the accelerated one in turn, from the same weights.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from sendvae_fast.nn import AdamWEMA, accelerate


def training_step(vae: AutoencoderKL, optimizer: AdamWEMA, images: torch.Tensor) -> tuple[float, float]:
    """One step of reconstruction; its loss and its duration in seconds."""
    start = time.perf_counter()
    posterior = vae.encode(images).latent_dist
    loss = F.mse_loss(vae.decode(posterior.mode()).sample, images) + 1e-6 * posterior.kl().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), time.perf_counter() - start


parser = argparse.ArgumentParser()
parser.add_argument("--size", type=int, default=32, help="pixels per side")
parser.add_argument("--channels", type=int, nargs="+", default=[32, 64], help="of each level")
parser.add_argument("--steps", type=int, default=8)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
levels = len(args.channels)
blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
plain = AutoencoderKL(block_out_channels=args.channels, norm_num_groups=16, **blocks)
plain.to(device, memory_format=torch.channels_last)
fast = copy.deepcopy(plain)
print(f"swapped: {accelerate(fast)} pairs of GroupNorm and SiLU")

coarse = torch.rand(4, 3, 4, 4, device=device) * 2 - 1
images = F.interpolate(coarse, args.size, mode="bilinear").to(memory_format=torch.channels_last)
with torch.no_grad():
    before, after = plain(images).sample, fast(images).sample
print(f"largest difference: {(after - before).abs().max() / before.abs().max():.1e} of the largest output")

networks, results = {"plain": plain, "accelerated": fast}, {"plain": [], "accelerated": []}
optimizers = {name: AdamWEMA(vae.parameters(), lr=1e-3, ema_decay=0.99) for name, vae in networks.items()}
for _ in range(args.steps):
    for name, vae in networks.items():
        results[name].append(training_step(vae, optimizers[name], images))
for name, steps in results.items():
    print(f"{name}: loss {steps[0][0]:.4f} to {steps[-1][0]:.4f}")
before_s, after_s = (statistics.median(seconds for _, seconds in steps[1:]) for steps in results.values())
print(f"a step takes {before_s * 1e3:.0f} ms and {after_s * 1e3:.0f} ms: {before_s / after_s:.2f}x")
