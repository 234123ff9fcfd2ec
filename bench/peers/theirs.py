"""What the peers' steps have in common: accelerate, the switches of a column, weights that are not all zero."""

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.case import Column

_ACCELERATE = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Runner:
    """The peer's accelerator, and how a column wants networks and optimizers.

    Args:
        accelerator: the class `accelerate.Accelerator`, as the peer imported it.
        column: the switches.
        compiles: whether the peer compiles whole networks as shipped.
        device: where it runs.
    """

    def __init__(self, accelerator: Any, column: Column, device: torch.device, *, compiles: bool) -> None:
        self.column, self.device = column, device
        self.compiles = column.compile == "whole" or (compiles and column.compile == "shipped")
        self.accelerator = accelerator(mixed_precision=_ACCELERATE[column.precision], cpu=device.type == "cpu")
        if column.tuned:
            allow_tf32(column.precision != "fp32")  # where float32 is asked for, it is

    def network(self, module: nn.Module) -> Any:
        """The network on the device, in the column's memory layout; the module itself."""
        if self.column.tuned:
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - as documented
        return module.to(self.device)

    def prepared(self, module: nn.Module) -> Any:
        """What the peer calls in place of the network: compiled if the column says so, under autocast."""
        return self.accelerator.prepare(torch.compile(module) if self.compiles else module)

    def optimizer(self, parameters: Iterable[nn.Parameter], **settings: Any) -> Any:
        """AdamW, prepared."""
        fused = True if self.column.tuned else None
        return self.accelerator.prepare(torch.optim.AdamW(parameters, fused=fused, **settings))

    def maps(self, x: Tensor) -> Tensor:
        """Pictures or latents [B, C, H, W] on the device, in the column's memory layout."""
        x = x.to(self.device)
        return x.contiguous(memory_format=torch.channels_last) if self.column.tuned else x

    @property
    def loss_scale(self) -> float:
        """What the accelerator multiplies losses by before their backward pass: 1 but in float16."""
        scaler = getattr(self.accelerator, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())


def allow_tf32(allowed: bool) -> None:
    """TF32 in matrix products and convolutions, as the peers' scripts switch it."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@torch.no_grad()
def fill_zero_weights(network: nn.Module) -> None:
    """Give weights to the layers that adaLN-Zero starts at zero, so that a wrong block shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def random_features(batch_size: int, num_tokens: int, dim: int) -> Tensor:
    """A foundation model's features [B, N, D], at random."""
    return torch.randn(batch_size, num_tokens, dim, generator=torch.Generator().manual_seed(1))


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of those of the packages that are installed, by name."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
