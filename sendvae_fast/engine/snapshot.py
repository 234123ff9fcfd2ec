"""A checkpoint's tensors in host memory, as they were at the end of a step, for a thread beside the steps to write."""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from sendvae_fast.engine.streams import HostMemory

LARGEST = 2.0**63
"""Weights, averages and moments beyond this are exploded: the square of such a number, and so the norm of what holds
it, is beyond fp32."""

Write = Callable[[Path], None]
"""Writes this rank's files of a checkpoint into its directory, by `sendvae_fast.files`. No collectives."""


class UnsoundStateError(Exception):
    """State that no run should go on from; the message names the first such tensor."""


class Snapshot:
    """Tensors by name, copied by the thread that trains; see `HostMemory`.

    Args:
        memory: where the copies are; those of the snapshot before are overwritten.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._tensors: list[tuple[str, Tensor]] = []
        memory.start()

    def copy(self, name: str, value: Tensor) -> Tensor:
        """A contiguous copy of `value` on the CPU, to be read after `wait`."""
        copy = self._memory.copy(value)
        self._tensors.append((name, copy))
        return copy

    def wait(self) -> None:
        """Let the thread that writes wait for the copies, and look at them.

        Raises:
            UnsoundStateError: a number is NaN, infinite or beyond `LARGEST`.
        """
        self._memory.wait()
        unsound = find_unsound(self._tensors)
        if unsound:
            name, reason = unsound[0]
            more = f", and {len(unsound) - 1} more tensors" if len(unsound) > 1 else ""
            raise UnsoundStateError(f"{name} {reason}{more}")


def find_unsound(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """Names of tensors with a number that is not finite or beyond `LARGEST`, and the reason: "has NaN or inf"."""
    unsound = []
    for name, value in tensors:
        if not value.is_floating_point() or value.numel() == 0:
            continue
        largest = value.abs().amax()  # NaN where there is one
        if not largest.isfinite():
            unsound.append((name, "has NaN or inf"))
        elif largest > LARGEST:
            unsound.append((name, f"has a number of size {largest.item():.1e}"))
    return unsound
