"""Fused PyTorch ops, modules and a training engine for generation-friendly VAEs (Send-VAE) and flow transformers.

As a library: `load_autoencoder` and `load_generator` for trained networks, `ops` for the fused operations, `nn` for
modules that fit anybody's network. Each name is imported at its first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sendvae_fast.version import __version__

if TYPE_CHECKING:
    from sendvae_fast import nn, ops
    from sendvae_fast.pretrained import load_autoencoder, load_generator

__all__ = ["__version__", "load_autoencoder", "load_generator", "nn", "ops"]


def __getattr__(name: str) -> Any:
    if name in ("nn", "ops"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in ("load_autoencoder", "load_generator"):
        return getattr(importlib.import_module(f"{__name__}.pretrained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
