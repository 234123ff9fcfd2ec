"""torch.compile and activation checkpointing of the repeated blocks of a network.

Each block is compiled or recomputed as a whole and in place: the network, its state dict and its hooks stay the same.
Equal blocks share one compilation, which takes a seventh of the time of compiling the whole network, and engines can
hook the modules between the blocks.

These attributes of a module or its class say whether it may be compiled and recomputed:

    compiles = True      its forward pass is one graph
    recomputes = True    a second forward pass changes nothing: it keeps no state, and all randomness is stateless
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Every width, resolution and use (with gradients, without, with one for its input) of a kind of block is compiled
# separately: 30 for the residual blocks of f16d32. torch.compile gives up at 8 unless told otherwise.
MAX_COMPILED_FORMS = 256


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of `network` (`compiled_blocks`) in place, at their first call.

    A graph break is an error.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_FORMS)
    for block in compiled_blocks(network):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)


def compiled_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The modules that compile, except those with a SyncBatchNorm, whose shapes depend on other ranks."""
    for module in network.modules():
        synchronises = any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())
        if getattr(module, "compiles", False) and not synchronises:
            yield module


def recomputed_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The modules that recompute."""
    return (module for module in network.modules() if getattr(module, "recomputes", False))


def recompute_blocks(network: nn.Module) -> None:
    """Let the blocks of `network` (`recomputed_blocks`) keep only their inputs; the backward pass computes them again.

    Gradients are the same, bit for bit where the blocks' kernels repeat. Call it after `compile_blocks`.
    """
    for module in recomputed_blocks(network):
        module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return call
