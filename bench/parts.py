"""Commands that are run one after the other, each within its time, and the table of their results."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.machine import ROOT

PASSED, FAILED, SKIPPED, LEFT = "passed", "FAILED", "skipped", "left"
LAST_LINES = 30
KILL_AFTER_S = 5


@dataclass
class Part:
    """One row of the table."""

    name: str
    outcome: str
    seconds: float = 0.0
    detail: str = ""
    facts: dict = field(default_factory=dict)
    commit: str | None = None


class Runner:
    """Runs commands in the repository's root, their output into one log, until the time for all of them is up."""

    def __init__(self, log: Path, seconds: float):
        self.log = log
        self.deadline = time.monotonic() + seconds
        log.write_text("")

    @property
    def remaining_s(self) -> float:
        """The time left for all parts."""
        return self.deadline - time.monotonic()

    def run(
        self, name: str, command: list[str], limit_s: float, environment: dict[str, str] | None = None
    ) -> tuple[Part, str]:
        """Run one command for at most `limit_s`; it and all that it started are ended then. Its row and its output.

        A command that the end of the time for all parts has cut short is left for another time, and has not failed.
        """
        is_cut = limit_s > self.remaining_s
        limit_s = min(limit_s, self.remaining_s)
        if limit_s <= 0:
            return Part(name, LEFT), ""
        title = f"== {name}, at most {limit_s:.0f} s: {' '.join(command)}\n"
        print(title, end="", flush=True)
        start_s = time.monotonic()
        with self.log.open("a") as log:
            log.write(title)
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})},
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit_s)
                detail = "" if code == 0 else f"exit code {code}"
            except BaseException as error:  # also an interrupt of ours, which does not reach its session
                end_group(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code, detail = None, f"stopped after {limit_s:.0f} s"
        output = self.log.read_bytes()[begin:].decode(errors="replace")
        if code != 0:
            print(*output.splitlines()[-LAST_LINES:], sep="\n", flush=True)
        outcome = PASSED if code == 0 else LEFT if code is None and is_cut else FAILED
        return Part(name, outcome, time.monotonic() - start_s, detail), output


def end_group(process: subprocess.Popen) -> None:
    """End a process and those it started: interrupted first, so that pytest still writes its report, then killed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):  # all are gone
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_AFTER_S)


def table(parts: list[Part]) -> str:
    """The table of the parts' results."""
    width = max(len(part.name) for part in parts)
    return "\n".join(
        f"  {part.name:<{width}}  {part.outcome:<7}  {part.seconds:6.1f} s  {part.detail}".rstrip() for part in parts
    )
