"""Numbers and lines of Markdown tables."""

import math
from collections.abc import Iterable, Sequence


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


def interval_text(value: float, interval: Sequence[float] | None, digits: int, sign: str = "") -> str:
    """A value with its interval, if it has one: "0.57 [0.55, 0.59]"."""
    text = f"{value:{sign}.{digits}f}"
    return text if interval is None else f"{text} [{interval[0]:{sign}.{digits}f}, {interval[1]:{sign}.{digits}f}]"
