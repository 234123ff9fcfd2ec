"""Floating-point operations of a computation, counted without doing it, and what GPUs can do at most."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sendvae_fast import ops
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.peak_flops import PEAK_BF16_FLOPS
from sendvae_fast.progress import Progress


class FlopCounter(TorchDispatchMode):
    """Adds up PyTorch's own formulas, as its FlopCounterMode does; that one's hooks on modules forbid autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class PretendedFlopCounter(FlopCounter):
    """Counts under `FakeTensorMode`, which takes group norms apart: that would be half of an autoencoder's time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.native_group_norm.default:
            x, _, _, batch, _, _, groups, _ = args
            return torch.empty_like(x), x.new_empty(batch, groups), x.new_empty(batch, groups)
        return super().__torch_dispatch__(func, types, args, kwargs)


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations (a multiply-add is two) of convolutions, matrix products and attention in a call."""
    with FlopCounter() as counter:
        call()
    return counter.total


def forward_flops(call: Callable[[], object]) -> int:
    """`count_flops` of a call that is only pretended: nothing is computed, no memory is taken, no module changes.

    Args:
        call: makes its tensors and runs networks without gradients; fused ops stand for nothing, as they have no matrix
            products, and attention is counted as two.
    """
    pretending = nullcontext() if active_fake_mode() else FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), ops.use_attention("math"), ops.use_backend("reference"), pretending:
        with PretendedFlopCounter() as counter:
            call()
    return counter.total


_counted: dict[str, dict[str, int]] = {}


def flops_are_read(distributed: Distributed, dtype: torch.dtype) -> bool:
    """Whether anybody reads a run's FLOPs: rank 0's header, the MFU on a GPU whose peak is known, or `plan`.

    Args:
        distributed: the ranks.
        dtype: in which the networks compute.
    """
    has_header = distributed.is_main and not Progress.is_silent()
    return has_header or peak_flops(distributed.device, dtype) is not None or active_fake_mode() is not None


def flops_by_part(
    count: Callable[[], Mapping[str, int]], *settings: object, are_read: bool = True
) -> dict[str, int] | None:
    """What `count` gives, or None where a network cannot be pretended: numbers for people, which end no run.

    Args:
        count: FLOPs of one image by part of a step.
        settings: all that they depend on. What has been counted in this process for settings of the same `repr` is not
            counted again, which would take as long as several steps of a small network.
        are_read: whether anybody reads them (`flops_are_read`); None otherwise.
    """
    if not are_read:
        return None
    key = repr(settings)
    if key not in _counted:
        with suppress(Exception):
            _counted[key] = dict(count())
    return dict(_counted[key]) if key in _counted else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most floating-point operations per second of a device in matrix products; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)
