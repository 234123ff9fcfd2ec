"""Progress of a long step: a live bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

PLAIN_INTERVAL_S = 10.0


class Progress:
    """Counts `total` units of work on rank 0 and shows rate, time left and named values.

    with Progress("train vae", total=500, unit="step", start=100) as progress:
        progress.advance(1, loss=0.31)

    On a terminal it is a live bar; elsewhere a plain line at most every `PLAIN_INTERVAL_S` seconds and one at the
    end. Ranks other than 0 print nothing.
    """

    _all_silent = False

    @classmethod
    def silence(cls) -> None:
        """Show no progress in this process from now on, because another process shows it."""
        cls._all_silent = True

    @classmethod
    def is_silent(cls) -> bool:
        """Whether `silence` was called."""
        return cls._all_silent

    @classmethod
    @contextmanager
    def silenced(cls) -> Iterator[None]:
        """Context in which new progress is not shown, because it is part of work whose progress is."""
        before, cls._all_silent = cls._all_silent, True
        try:
            yield
        finally:
            cls._all_silent = before

    def __init__(self, title: str, total: int, unit: str = "it", start: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self._start = start
        self._silent = Progress._all_silent or int(os.environ.get("RANK", "0")) != 0
        self._bar: RichProgress | None = None
        self._values: dict[str, float] = {}
        self._printed: int | None = None

    def __enter__(self) -> Self:
        self._began_s = self._last_line_s = time.monotonic()
        if not self._silent and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=10),
                TaskProgressColumn(table_column=Column(no_wrap=True)),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                # What there is no room for is cut off here, and not in the time that is left.
                TextColumn("{task.fields[values]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True), expand=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, rate="", values="")
        return self

    def advance(self, count: int = 1, **values: float) -> None:
        """Report `count` more units done, with named values to show beside the bar from now on."""
        self.done += count
        self._values.update(values)
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate_text(), values=self._values_text())
        elif time.monotonic() - self._last_line_s >= PLAIN_INTERVAL_S and self._printed != self.total:
            self._print_line()

    def say(self, line: str) -> None:
        """Print a line: above the bar, or in place of the next plain line."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._last_line_s = time.monotonic()
            print(f"{self.title}: {line}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._silent and kind is None and self.done != self._printed:
            self._print_line()

    @property
    def rate_per_s(self) -> float:
        """Units per second since the start of this process's work."""
        return (self.done - self._start) / max(time.monotonic() - self._began_s, 1e-9)

    def _rate_text(self) -> str:
        return f"{self.rate_per_s:.1f} {self.unit}/s"

    def _values_text(self) -> str:
        return " ".join(f"{name} {value:.4g}" for name, value in self._values.items())

    def _print_line(self) -> None:
        self._last_line_s, self._printed = time.monotonic(), self.done
        if self.done >= self.total:
            left = f"took {self._last_line_s - self._began_s:.1f} s"
        else:
            left = f"{(self.total - self.done) / self.rate_per_s:.0f} s left" if self.rate_per_s > 0 else ""
        parts = (f"{self.title}: {self.done}/{self.total} {self.unit}", self._rate_text(), left, self._values_text())
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
