"""Named numbers over steps, in `metrics.jsonl` and the loggers of the run. A failing logger never stops training."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.loggers import CLASSES, Logger
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import LoggingConfig
from sendvae_fast.files import write_atomic


class MetricsLogger:
    """Appends one line `{"step": 7, "time_s": 1700000000.0, "loss": 0.5}` per call, on rank 0 only.

    The same numbers go to every logger of `config`, under tags by group ("loss/align", "speed/img_per_s"). One that
    fails is named once, in a warning, and tried again with the next numbers.

    Args:
        run: whose directory is written to.
        distributed: the ranks that train.
        last_step: the step training resumes from (0 for a new run): later lines of an interrupted run are dropped, so
            that no curve has a step twice.
        config: the loggers; by default TensorBoard.
    """

    def __init__(
        self, run: RunDirectory, distributed: Distributed, last_step: int = 0, config: LoggingConfig | None = None
    ) -> None:
        self._sinks: dict[str, Logger] = {}
        self._warned: set[str] = set()
        if not distributed.is_main:
            return
        config = config or LoggingConfig()
        self._start("metrics.jsonl", lambda: MetricsFile(run, last_step))
        for name in config.to:
            self._start(name, lambda name=name: CLASSES[name](run, config, last_step))

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record `values` (numbers or one-element tensors) at `step`. NaN and infinities are null in the JSON line."""
        if self._sinks:
            numbers = {name: float(value) for name, value in values.items()}
            self._each(lambda sink: sink.log(step, numbers))

    def pictures(self, step: int, folder: Path) -> None:
        """Show the previews of a step: the files ``<name>_<step>.png`` of a folder, as "pictures/<name>"."""
        for path in sorted(folder.glob(f"*_{step:08d}.png")) if self._sinks else []:
            self._each(lambda sink, path=path: sink.picture(step, f"pictures/{path.stem.rpartition('_')[0]}", path))

    def close(self) -> None:
        """Finish every logger."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _start(self, name: str, build: Callable[[], Any]) -> None:
        try:
            sink = build()
        except Exception as error:
            self._warn(name, error)
        else:
            self._sinks[name] = sink

    def _each(self, work: Callable[[Logger], None]) -> None:
        for name, sink in self._sinks.items():
            try:
                work(sink)
            except Exception as error:
                self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self._warned:
            words = " ".join(str(error).split())
            print(f"warning: metrics are not being recorded by {name} ({words}); training goes on", file=sys.stderr)
        self._warned.add(name)


class MetricsFile:
    """`metrics.jsonl`: a line per call, in the file as soon as it is logged."""

    def __init__(self, run: RunDirectory, last_step: int) -> None:
        if run.metrics.exists():
            lines = run.metrics.read_text(encoding="utf-8").splitlines()
            write_atomic(run.metrics, "".join(line + "\n" for line in lines if _is_up_to(line, last_step)))
        # Buffered by line.
        self._file = open(run.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time_s": round(time.time(), 3), **finite}) + "\n")

    def picture(self, step: int, tag: str, path: Path) -> None:
        """Nothing: it lies in the run's folder already."""

    def close(self) -> None:
        self._file.close()


def _is_up_to(line: str, last_step: int) -> bool:
    """Whether a line's step is at most `last_step`; False for a line cut off by a crash."""
    try:
        return json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False
