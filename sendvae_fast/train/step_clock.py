"""How fast a run goes: the time of the steps since its last line, and how much of it was spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
GIB = 2**30


class StepClock:
    """Measures windows of steps, on the host.

    Args:
        device: whose peak memory is asked for.
        images_per_step: over all ranks.
        flops_per_image: of a training step; None where it is not known.
        peak_flops: of all ranks' devices together, per second; None where it is not known.
    """

    def __init__(
        self,
        device: torch.device,
        images_per_step: int,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._device, self._images_per_step = device, images_per_step
        self._mfu_per_img_per_s = flops_per_image / peak_flops if flops_per_image and peak_flops else None
        self._began_s, self._paused_s, self._waited_s, self._num_steps = time.monotonic(), 0.0, 0.0, 0

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch; the time until it is there counts as waiting for data."""
        began_s = time.monotonic()
        batch = next(batches)
        self._waited_s += time.monotonic() - began_s
        self._num_steps += 1
        return batch

    def leave_out(self, seconds: float) -> None:
        """Time that belongs to no step: a checkpoint, a preview."""
        self._paused_s += seconds

    def read(self) -> dict[str, float]:
        """The window's numbers; starts a new one. The first of a GPU includes its kernels' compilation.

        img_per_s, step_ms (means of the window), data_share (of its time, waiting for data), mfu (FLOPs done over those
        that the devices could do, where both are known), peak_memory_gib (PyTorch's, of this rank's GPU).
        """
        seconds = max(time.monotonic() - self._began_s - self._paused_s, 1e-9)
        num_steps = max(self._num_steps, 1)
        img_per_s = num_steps * self._images_per_step / seconds
        values = {
            "img_per_s": img_per_s,
            "step_ms": 1e3 * seconds / num_steps,
            "data_share": min(self._waited_s / seconds, 1.0),
        }
        if self._mfu_per_img_per_s is not None:
            values["mfu"] = img_per_s * self._mfu_per_img_per_s
        if self._device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
            torch.cuda.reset_peak_memory_stats(self._device)
        self._began_s, self._paused_s, self._waited_s, self._num_steps = time.monotonic(), 0.0, 0.0, 0
        return values
