"""Named numbers over steps, in `metrics.jsonl` and TensorBoard. A failing logger never stops training."""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.files import write_atomic


class MetricsLogger:
    """Appends one line `{"step": 7, "time_s": 1700000000.0, "loss": 0.5}` per call, on rank 0 only.

    Args:
        run: whose directory is written to.
        distributed: the ranks that train.
        last_step: the step training resumes from (0 for a new run): later lines of an interrupted run are dropped, so
            that no curve has a step twice.
    """

    def __init__(self, run: RunDirectory, distributed: Distributed, last_step: int = 0) -> None:
        self._file = self._writer = None
        self._warned = False
        self._is_main = distributed.is_main
        if self._is_main:
            self._attempt(lambda: self._open(run, last_step))

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record `values` (numbers or one-element tensors) at `step`. NaN and infinities are null in the JSON line."""
        if self._is_main:
            self._attempt(lambda: self._log(step, {name: float(value) for name, value in values.items()}))

    def close(self) -> None:
        for sink in (self._file, self._writer):
            if sink is not None:
                self._attempt(sink.close)

    def _open(self, run: RunDirectory, last_step: int) -> None:
        if run.metrics.exists():
            lines = run.metrics.read_text(encoding="utf-8").splitlines()
            write_atomic(run.metrics, "".join(line + "\n" for line in lines if _is_up_to(line, last_step)))
        # Buffered by line: a line is in the file as soon as it is logged.
        self._file = open(run.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        if importlib.util.find_spec("tensorboard") is None:
            print("note: no TensorBoard curves without pip install 'sendvae_fast[logging]'", file=sys.stderr)
            return
        # Here, because it takes a second to import.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.tensorboard), purge_step=last_step + 1)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, "time_s": round(time.time(), 3), **finite}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def _attempt(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            if not self._warned:
                print(f"warning: metrics are not being recorded ({error}); training goes on", file=sys.stderr)
            self._warned = True


def _is_up_to(line: str, last_step: int) -> bool:
    """Whether a line's step is at most `last_step`; False for a line cut off by a crash."""
    try:
        return json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False
