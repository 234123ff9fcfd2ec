"""Gradient accumulation: a step's batch in equal parts, and the means of what they log."""

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


def add_means(logged: dict[str, Tensor | float], values: dict[str, Tensor], num: int) -> None:
    """Add `values` / `num` to the scalars in `logged`: after `num` calls it holds their means."""
    for name, value in values.items():
        logged[name] = logged.get(name, 0.0) + value.detach() / num
