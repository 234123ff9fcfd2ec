"""A network whose evaluations are recorded once and replayed.

With `engine.streams.CudaGraphRecorder` as CUDA graphs, which cost the host one launch each.

Within the guidance interval a sampler evaluates 2B rows, outside it B: two recordings for a batch size, which every
step of every batch of that size replays. The tensors that a recording reads and writes stay in place: inputs are copied
in, the velocity is copied out.

Shape letters: B batch, R rows (B or 2B), C latent channels, H W latent height and width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sendvae_fast.sampling.guidance import LabelledModel

# Runs work that reads and writes the same tensors every time, and returns the function that repeats it
Record = Callable[[Callable[[], None]], Callable[[], None]]


class ReplayedModel:
    """Evaluates `model` as itself, to the bit, from one recording per number of rows."""

    def __init__(self, model: LabelledModel, record: Record) -> None:
        self._model, self._record = model, record
        self._recordings: dict[tuple[torch.Size, torch.dtype], _Recording] = {}

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """x [R, C, H, W], t [R], labels int64 [R]; the velocity [R, C, H, W] is the caller's own."""
        key = (x.shape, x.dtype)
        if key not in self._recordings:
            self._recordings[key] = _Recording(self._model, (x, t, labels), self._record)
        return self._recordings[key](x, t, labels), None


class _Recording:
    def __init__(self, model: LabelledModel, inputs: tuple[Tensor, Tensor, Tensor], record: Record) -> None:
        self._inputs = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs)
        # Outside the pool of the graphs, where the next graph would write over it.
        self._velocity = torch.empty_like(model(*self._inputs)[0])

        def work() -> None:
            self._velocity.copy_(model(*self._inputs)[0])

        self._replay = record(work)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._replay()
        return self._velocity.clone()
