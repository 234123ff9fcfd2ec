"""The memory of a computation by what it is for, tensor by tensor; on fake tensors none of it is taken."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, GRADIENTS = "activations", "gradients"


@contextmanager
def only_young() -> Iterator[None]:
    """Keep all that is made in the block in the youngest generation of garbage, which is quick to look through.

    A look through all that a process has imported takes longer than most networks of fake tensors.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes, from then until nothing refers to its memory.

    What operations make is `ACTIVATIONS` until `claim` says otherwise: the batch, what autograd saves, results on
    their way. What a kernel takes and gives back within its call is not seen. As PyTorch's modes it counts the
    operations of the thread that enters it; autograd runs backward passes on CPU tensors, fake ones too, on that one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, int] = {ACTIVATIONS: 0, GRADIENTS: 0}
        """Bytes by kind."""
        self._kinds: dict[int, str] = {}  # by the address of the storage
        self.begin()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._follow(value)
        return out

    def begin(self) -> None:
        """Forget the peaks so far."""
        self.peak = dict(self.now)
        """Bytes by kind when activations and gradients together were the most."""
        self.peak_activations = self.now[ACTIVATIONS]
        """The most bytes of activations alone."""

    def claim(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what the memory of `tensors` is for; what was claimed before stays as it is."""
        for tensor in tensors:
            self._follow(tensor)
            storage = tensor.untyped_storage()
            if self._kinds[storage._cdata] == ACTIVATIONS:
                self._kinds[storage._cdata] = kind
                self.now[ACTIVATIONS] -= storage.nbytes()
                self.now[kind] = self.now.get(kind, 0) + storage.nbytes()

    def claim_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count what backward passes leave in `grad` as `GRADIENTS` from now on."""

        def claim(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.claim(GRADIENTS, [parameter.grad])

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(claim)

    def claim_rest(self, kind: str) -> None:
        """Say what all memory is for that is still `ACTIVATIONS`, but for what only cycles of `only_young` hold."""
        gc.collect(0)
        for address, of_kind in self._kinds.items():
            if of_kind == ACTIVATIONS:
                self._kinds[address] = kind
        self.now[kind] = self.now.get(kind, 0) + self.now[ACTIVATIONS]
        self.now[ACTIVATIONS] = 0

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._kinds:
            return
        self._kinds[address] = ACTIVATIONS
        self.now[ACTIVATIONS] += size
        weakref.finalize(storage, self._forget, address, size).atexit = False
        if self.now[ACTIVATIONS] + self.now[GRADIENTS] > self.peak[ACTIVATIONS] + self.peak[GRADIENTS]:
            self.peak = dict(self.now)
        self.peak_activations = max(self.peak_activations, self.now[ACTIVATIONS])

    def _forget(self, address: int, size: int) -> None:
        self.now[self._kinds.pop(address)] -= size
