"""What trades memory or start-up time for speed, by the repeated blocks of a network.

Blocks are compiled, or recomputed, each as a whole and each in place: the network, its state dict and its hooks stay
what they are. A block compiled is shared by all blocks like it, which takes a seventh of the time that compiling the
whole network takes, and leaves engines free to hook what lies between the blocks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as ViTBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.autoencoder.autoencoder import AttentionBlock, ResnetBlock
from sendvae_fast.models.discriminator import Discriminator
from sendvae_fast.models.mappers import mapper
from sendvae_fast.models.sit.sit import SiTBlock

# Nothing in them keeps state, so that a second forward pass changes nothing. All randomness is stateless in any case.
RECOMPUTED = (ResnetBlock, AttentionBlock, SiTBlock, mapper.Block)
COMPILED = (*RECOMPUTED, Discriminator, ViTBlock, EvaBlock)
# Every width, resolution and use (with gradients, without, with one for its input) of a kind of block is compiled for
# itself: 30 for the residual blocks of f16d32. torch.compile gives up at 8 unless told otherwise.
MAX_COMPILED_FORMS = 256


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of `network` in place (`COMPILED`, and the stages of an LPIPS backbone), at their first call.

    Without a graph break: what cannot be compiled is an error.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_FORMS)
    for block in compiled_blocks(network):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)


def compiled_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What `compile_blocks` compiles: not a discriminator with SyncBatchNorm, whose graph depends on other ranks."""
    for module in network.modules():
        if isinstance(module, COMPILED):
            if not any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
                yield module
        elif isinstance(module, Perceptual):
            yield from (stage for stage in module.lpips.net.children() if isinstance(stage, nn.Sequential))


def recompute_blocks(network: nn.Module) -> None:
    """Let the blocks of `network` (`RECOMPUTED`) keep their inputs alone and be computed again in the backward pass.

    Gradients are the same, bit for bit where the blocks' kernels repeat. Call it after `compile_blocks`.
    """
    for module in network.modules():
        if isinstance(module, RECOMPUTED):
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return call
