"""Gradient accumulation: a step's batch in equal parts, and the means of their logged values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound=tuple)


def micro_batches(batch: Batch, num: int, device: torch.device) -> Iterator[Batch]:
    """Split a named tuple of tensors (None stays None) into `num` equal parts on `device`."""
    parts = [
        part.to(device, non_blocking=True).chunk(num) if isinstance(part, Tensor) else [part] * num for part in batch
    ]
    return (type(batch)(*micro) for micro in zip(*parts, strict=True))


class Means:
    """Means of the values that the `num` micro-batches of a step log, on the device: the host does not wait."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.values: dict[str, Tensor] = {}
        """The sums so far over `num`: the means, after as many calls of `add`."""

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in the scalars of one micro-batch."""
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value.detach() / self.num
