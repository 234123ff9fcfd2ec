"""Happens-before, by vector clocks: of each line of work, how much of every other has happened before."""

from __future__ import annotations


class Line:
    """A line of work that goes in order: a host thread, or a stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[Line, int] = {self: 0}

    def __repr__(self) -> str:
        return self.name

    def tick(self) -> Moment:
        """A new piece of work on this line."""
        self.clock[self] += 1
        return Moment(self, self.clock[self])

    def wait_for(self, clock: dict[Line, int]) -> None:
        """Let all that `clock` counts happen before the next work of this line."""
        for line, time in clock.items():
            self.clock[line] = max(self.clock.get(line, 0), time)

    def has_seen(self, moment: Moment) -> bool:
        return self.clock.get(moment.line, 0) >= moment.time


class Moment:
    """A piece of work on a line."""

    def __init__(self, line: Line, time: int) -> None:
        self.line, self.time = line, time
