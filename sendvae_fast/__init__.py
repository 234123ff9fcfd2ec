"""Fused PyTorch ops, modules and a training engine for generation-friendly VAEs (Send-VAE) and the flow transformers on
top of them.

As a library: `ops` for the fused operations, `nn` for modules that fit anybody's network. Each is imported when it is
first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sendvae_fast.version import __version__

if TYPE_CHECKING:
    from sendvae_fast import nn, ops

__all__ = ["__version__", "nn", "ops"]


def __getattr__(name: str) -> Any:
    if name in ("nn", "ops"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
