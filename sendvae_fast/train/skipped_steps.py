"""Steps whose gradients were not finite: counted, the first explained, and a run that only skips is ended."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.streams import ToHost
from sendvae_fast.errors import UserError

MAX_SKIPPED_STEPS = 100
"""Skipped steps in a row after which a run ends, because more would only burn time."""
NUM_IDS_SHOWN = 8
"""Sample ids that a warning spells out."""


class _Seen(NamedTuple):
    step: int
    norm: ToHost | float
    names: list[str]
    values: Tensor
    """What the step logs, copied on the device: a replayed step writes its results to the same memory again."""
    ids: Tensor | None


class SkippedSteps:
    """Watches the norms of a run's gradients; the same on every rank.

    A norm that is on the device is read a step late: by then the device has the next step to do while the host waits.

    Args:
        distributed: the ranks that train.
        command: that trains, such as "train vae", for the advice in the warning.
    """

    def __init__(self, distributed: Distributed, command: str) -> None:
        self._distributed, self._command = distributed, command
        self._in_a_row = self._num_new = 0
        self._has_warned = False
        self._unread: _Seen | None = None

    def see(self, step: int, values: Mapping[str, Tensor | float], ids: Tensor | None) -> None:
        """Take note of a step and read the one before. Collective.

        Args:
            step: its number; the first step of a run is 1.
            values: what it logs in the order of its computation, `grad_norm` among it.
            ids: sample ids of this rank's batch.

        Raises:
            UserError: the step read is the `MAX_SKIPPED_STEPS`-th skipped in a row.
        """
        norm = values["grad_norm"]
        copied = torch.stack([torch.as_tensor(value).detach().float() for value in _on_one_device(values)])
        seen = _Seen(step, ToHost(norm) if isinstance(norm, Tensor) else norm, list(values), copied, ids)
        self.read()
        self._unread = seen
        if not isinstance(seen.norm, ToHost):
            self.read()

    def read(self) -> None:
        """Read what is still to be read. Collective; UserError like `see`."""
        if self._unread is None:
            return
        seen, self._unread = self._unread, None
        if math.isfinite(seen.norm.wait() if isinstance(seen.norm, ToHost) else seen.norm):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._num_new += 1
        if not self._has_warned:
            self._has_warned = True
            self._warn(seen)
        if self._in_a_row == MAX_SKIPPED_STEPS:
            raise UserError(
                f"the gradients of {MAX_SKIPPED_STEPS} steps in a row, up to step {seen.step}, were not finite, so the "
                "run was stopped: go on from its newest checkpoint with engine.precision=fp32, or start another run "
                "from it (init_from) with a lower learning rate"
            )

    def take_count(self) -> int:
        """Skipped steps since the last call, that of the newest step included. Collective."""
        self.read()
        count, self._num_new = self._num_new, 0
        return count

    def _warn(self, seen: _Seen) -> None:
        """Say where the first skipped step went wrong: the host waits for the device here, once in a run."""
        own = (
            first_not_finite(dict(zip(seen.names, seen.values.tolist(), strict=True))),
            [] if seen.ids is None else seen.ids.tolist(),
        )
        of_ranks = self._distributed.gather_objects(own)
        if not self._distributed.is_main:
            return
        rank = next((rank for rank, (name, _) in enumerate(of_ranks) if name is not None), None)
        where = "every loss term is finite, so it was the backward pass"
        if rank is not None:
            name, ids = of_ranks[rank]
            more = f" and {len(ids) - NUM_IDS_SHOWN} more" if len(ids) > NUM_IDS_SHOWN else ""
            where = f"the first value that is not is `{name}` on rank {rank}"
            if ids:
                where += f" (samples {', '.join(map(str, ids[:NUM_IDS_SHOWN]))}{more})"
        print(
            f"warning: step {seen.step} was skipped, its gradients are not finite: {where}; `sendvae {self._command} "
            f"... --replay={seen.step}` with the settings of this run says more. Further ones are counted as "
            "skipped_steps in metrics.jsonl",
            file=sys.stderr,
            flush=True,
        )


def _on_one_device(values: Mapping[str, Tensor | float]) -> list[Tensor | float]:
    """The values, with numbers where the tensors are, so that they can be stacked there; no copy to the host."""
    like = next((value for value in values.values() if isinstance(value, Tensor)), None)
    if like is None:
        return list(values.values())
    return [value if isinstance(value, Tensor) else like.new_full((), value) for value in values.values()]


def first_not_finite(values: Mapping[str, Tensor | float]) -> str | None:
    """The first of a step's logged values that is not finite, or None; the sum of all terms and the norm come last."""
    terms = [name for name in values if name not in ("loss", "grad_norm")]
    return next((name for name in [*terms, "loss"] if name in values and not math.isfinite(float(values[name]))), None)
