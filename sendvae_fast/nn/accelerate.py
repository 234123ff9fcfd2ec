"""`accelerate`: the fused GroupNorm and SiLU in a network that somebody else wrote."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from sendvae_fast.models.norms import GroupNormSiLU
from sendvae_fast.ops import group_norm_silu

# By class name, so that the package need not be installed: attributes of classes whose forward calls the first and then
# the second on its result, and neither anywhere else.
_NORM_AND_ACTIVATION = {
    "diffusers.models.resnet.ResnetBlock2D": (("norm1", "nonlinearity"), ("norm2", "nonlinearity")),
    "diffusers.models.autoencoders.vae.Encoder": (("conv_norm_out", "conv_act"),),
    "diffusers.models.autoencoders.vae.Decoder": (("conv_norm_out", "conv_act"),),
}


def accelerate(module: nn.Module) -> int:
    """Compute each GroupNorm and the SiLU after it in one pass over memory, in `module` and all that it is made of.

    The known patterns, which are changed in place:

    - `nn.Sequential` (the class itself): every `nn.GroupNorm` followed by an `nn.SiLU`, for maps [B, C, H, W]; other
      inputs go through the two as before
    - diffusers' `ResnetBlock2D` without a time embedding, and the end of its VAE `Encoder` and `Decoder`: so
      `AutoencoderKL` and related classes

    Anything else stays as it is: norms without weights, other activations, subclasses, blocks with a time embedding.
    Parameters stay the same objects under the same names, so optimizers made before and state dicts of either form fit.
    Outputs are equal within rounding; maps come out channels-last and, under autocast, in the dtype they had. There are
    first derivatives only, and hooks on a swapped norm or activation do not run.

    The ops work on channels-last maps: with ``network.to(memory_format=torch.channels_last)`` and pictures laid out
    alike nothing is converted, and only then is there much to gain.

    Args:
        module: a network, on any device, in any mode; call this before it is compiled or wrapped for several ranks.

    Returns:
        The number of pairs swapped: 0 where no pattern is known, or all pairs were swapped before.

    Raises:
        TypeError: `module` is no `nn.Module`, such as a diffusers pipeline: give its ``vae``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, got a {type(module).__name__}: give the network itself")
    return sum(_swap_in_sequential(part) + _swap_attributes(part) for part in list(module.modules()))


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that computes GroupNorm and the SiLU after it in one op.

    Both stay in their places, so that indexing and slicing the sequence give the same modules as before.
    """

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Any] = list(self)
        while parts:
            part = parts.pop(0)
            if parts and _is_pair(part, parts[0]) and x.dim() == 4:
                parts.pop(0)
                x = group_norm_silu(x, part.weight, part.bias, part.num_groups, part.eps)  # pyright: ignore[reportAssignmentType] - one tensor
            else:
                x = part(x)
        return x


def _swap_in_sequential(module: nn.Module) -> int:
    if type(module) is not nn.Sequential:
        return 0
    parts = list(module)
    count = sum(_is_pair(norm, activation) for norm, activation in pairwise(parts))
    if count:
        module.__class__ = FusedSequential  # in place, so that every reference to it is fast
    return count


def _swap_attributes(module: nn.Module) -> int:
    pairs = _NORM_AND_ACTIVATION.get(f"{type(module).__module__}.{type(module).__qualname__}", ())
    # All or none: pairs may share the activation.
    if _takes_time(module) or not all(_is_pair(getattr(module, a), getattr(module, b)) for a, b in pairs):
        return 0
    for norm, _ in pairs:
        setattr(module, norm, _fused(getattr(module, norm)))
    for _, activation in pairs:
        setattr(module, activation, nn.Identity())
    return len(pairs)


def _takes_time(module: nn.Module) -> bool:
    """Whether a `ResnetBlock2D` has a time embedding go through its activation, or in between norm and activation."""
    projection = getattr(module, "time_emb_proj", None)
    return projection is not None or getattr(module, "time_embedding_norm", None) == "scale_shift"


def _is_pair(norm: nn.Module, activation: nn.Module) -> bool:
    # The classes themselves: a subclass may compute something else.
    if type(norm) is not nn.GroupNorm or type(activation) is not nn.SiLU:
        return False
    return norm.weight is not None and norm.bias is not None


def _fused(norm: nn.GroupNorm) -> GroupNormSiLU:
    """The fused norm with the same parameters, not copies of them."""
    fused = GroupNormSiLU(norm.num_groups, norm.num_channels, norm.eps, device="meta").train(norm.training)
    fused.weight, fused.bias = norm.weight, norm.bias
    return fused
