"""A network whose evaluations are recorded once and replayed (`engine.replayed_functions`).

Within the guidance interval a sampler evaluates 2B rows, outside it B: two recordings for a batch size, which every
step of every batch of that size replays.

Shape letters: B batch, C latent channels, R rows (B or 2B), H W latent height and width.
"""

import torch
from torch import Tensor

from sendvae_fast.engine.replayed_functions import Recorder, Replayed
from sendvae_fast.sampling.guidance import LabelledModel

NUM_FIRST_EVALUATIONS = 2
"""Evaluations of a number of rows before they are recorded."""


class ReplayedModel:
    """Evaluates `model` as itself, to the bit, from one recording per number of rows."""

    def __init__(self, model: LabelledModel, recorder: Recorder, device: torch.device) -> None:
        self._velocity = Replayed(lambda *inputs: model(*inputs)[0], recorder, device, NUM_FIRST_EVALUATIONS)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """x [R, C, H, W], t [R], labels int64 [R]; the velocity [R, C, H, W] is the caller's own."""
        return self._velocity(x, t, labels), None
