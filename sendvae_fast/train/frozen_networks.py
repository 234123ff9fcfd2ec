"""Frozen networks (foundation model, LPIPS), placed and compiled as the engine's settings say."""

from __future__ import annotations

from typing import TypeVar

import torch

from sendvae_fast.engine.blocks import compile_blocks
from sendvae_fast.engine.engine import dtype_of
from sendvae_fast.engine.settings import EngineConfig
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.foundation.foundation import Foundation, load_foundation
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.ops.layout import MEMORY_FORMAT

Frozen = TypeVar("Frozen", Foundation, Perceptual)


def build_foundation(
    weight: float, config: FoundationConfig, engine: EngineConfig, device: torch.device
) -> Foundation | None:
    """The frozen foundation model on `device`, or None when the alignment weight is 0 and nothing uses it."""
    return frozen_network(load_foundation(config), engine, device) if weight > 0 else None


def build_perceptual(config: PerceptualConfig | None, engine: EngineConfig, device: torch.device) -> Perceptual | None:
    """LPIPS on `device`, or None without a config."""
    return None if config is None else frozen_network(Perceptual(config), engine, device)


def frozen_network(network: Frozen, engine: EngineConfig, device: torch.device) -> Frozen:
    """A frozen network on `device`, with the engine's precision and compilation."""
    network = network.to(device, memory_format=MEMORY_FORMAT)  # pyright: ignore[reportCallIssue] - as documented
    network.compute_in(dtype_of(engine))
    if engine.compile:
        compile_blocks(network)
    return network
