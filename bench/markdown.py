"""Numbers and lines of Markdown tables."""

import math
from collections.abc import Iterable


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def duration(microseconds: float) -> str:
    """A time with three digits: "1.23 ms"."""
    if microseconds == 0:
        return "0 µs"
    value, unit = (microseconds, "µs") if microseconds < 1000 else (microseconds / 1000, "ms")
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{digits}f} {unit}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
