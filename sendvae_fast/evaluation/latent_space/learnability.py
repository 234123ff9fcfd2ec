"""The velocity loss that a small SiT of one fixed size reaches in a fixed number of steps: how learnable latents are.

Latents have mean 0 and deviation 1 by channel, so that losses of different autoencoders can be compared. Where there is
nothing to learn (white Gaussian latents) the best possible loss is ∫ dt / (t² + (1 - t)²) = π / 2 = 1.571.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.evaluation.latent_space.settings import LearnabilityConfig
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig, fields_of_latents
from sendvae_fast.ops import philox
from sendvae_fast.ops.noise_inject import noise_inject
from sendvae_fast.progress import Progress

MAX_GRID = 16
"""Tokens along a side at most: larger latents come in larger patches."""


def velocity_loss_of_small_sit(
    train: np.ndarray, test: np.ndarray, config: LearnabilityConfig, seed: int, device: torch.device
) -> Tensor:
    """Loss of each test latent after training, float32 [n].

    Args:
        train: normalised latents [m, C, H, W], square or one row.
        test: normalised latents [n, C, H, W].
        config: the network and its training.
        seed: of weights, order and noise; step and latent decide the rest.
        device: to train on.
    """
    torch.manual_seed(seed)
    model = SiT(
        SiTConfig(
            **fields_of_latents(train.shape[1:]), patch_size=max(1, train.shape[2] // MAX_GRID), num_classes=1,
            depth=config.depth, width=config.width, num_heads=config.width // 32, repa_dim=None,
        )
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    with Progress("velocity loss", config.num_steps, unit="step") as progress:
        for step in range(config.num_steps):
            ids = np.random.default_rng([seed, step]).integers(len(train), size=config.batch_size)
            loss = _losses(model, train, ids, philox.make_key(seed, step, device)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.advance(1, loss=float(loss.detach()))
    model.eval()
    key, parts = (
        philox.make_key(seed, config.num_steps, device),
        np.array_split(np.arange(len(test)), -(-len(test) // 256)),
    )
    with torch.no_grad():
        return torch.cat([_losses(model, test, ids, key).cpu() for ids in parts])


def _losses(model: SiT, latents: np.ndarray, ids: np.ndarray, key: Tensor) -> Tensor:
    """Mean squared error of the velocity of each of the latents `ids`, [len(ids)]."""
    device, channels = key.device, latents.shape[1]
    z = torch.from_numpy(latents[ids]).float().to(device)
    zeros, ones = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    places = torch.arange(len(ids), device=device)  # a latent that is drawn twice gets noise of its own
    noised = noise_inject(z, torch.zeros_like(z), zeros, ones, key, places, spread_is_std=True, need_z=False)
    velocity, _ = model(noised.z_t, noised.t, torch.zeros(len(ids), dtype=torch.int64, device=device))
    return (velocity - noised.velocity).square().flatten(1).mean(dim=1)
