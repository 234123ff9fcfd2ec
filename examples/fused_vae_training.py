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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64], help="of each level")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    levels = len(args.channels)
    plain = AutoencoderKL(
        block_out_channels=args.channels, norm_num_groups=16,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    fast = copy.deepcopy(plain)
    print(f"swapped: {accelerate(fast)} pairs of GroupNorm and SiLU")

    coarse = torch.rand(args.batch, 3, 4, 4, device=device) * 2 - 1
    images = F.interpolate(coarse, args.size, mode="bilinear").to(memory_format=torch.channels_last)
    with torch.no_grad():
        before, after = plain(images).sample, fast(images).sample
    print(f"largest difference: {(after - before).abs().max() / before.abs().max():.1e} of the largest output")

    steps = {"plain": [], "accelerated": []}
    networks = {"plain": plain, "accelerated": fast}
    optimizers = {name: AdamWEMA(vae.parameters(), lr=1e-3, ema_decay=0.99) for name, vae in networks.items()}
    for _ in range(args.steps):
        for name, vae in networks.items():
            steps[name].append(training_step(vae, optimizers[name], images))
    for name, results in steps.items():
        print(f"{name}: loss {results[0][0]:.4f} to {results[-1][0]:.4f}")
    before_s, after_s = (statistics.median(seconds for _, seconds in results[1:]) for results in steps.values())
    print(f"a step takes {before_s * 1e3:.0f} ms and {after_s * 1e3:.0f} ms: {before_s / after_s:.2f}x")


if __name__ == "__main__":
    main()
