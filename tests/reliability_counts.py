"""Counts of what the tests of reliability tried and what was survived, as JSON lines that docs/reliability.md shows.

Written only where SENDVAE_RELIABILITY_COUNTS names a file, as `make reliability` does, so that other runs of the tests
change nothing in the tree. A line of the same promise, words and test replaces the older one.
"""

import datetime
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FILE_VARIABLE = "SENDVAE_RELIABILITY_COUNTS"
"""Environment variable with the file that counts go to; relative paths are from the repository's root."""
FULL_VARIABLE = "SENDVAE_RELIABILITY"
"""Environment variable that asks for the full counts; without it tests take a thin sample of them."""
CASES = "cases of the test"
ROOT = Path(__file__).parents[1]


def full_counts() -> bool:
    """Whether the full counts were asked for."""
    return bool(os.environ.get(FULL_VARIABLE))


class Trials:
    """What was tried so far, and what went wrong in it."""

    def __init__(self) -> None:
        self.tried, self.failures = 0, []

    @contextmanager
    def trial(self, name: object) -> Iterator[None]:
        """One trial: an error in the block is kept for the end, and the next trial goes on."""
        self.tried += 1
        try:
            yield
        except Exception as error:
            self.failures.append((name, error))


@contextmanager
def counting(promise: str, what: str) -> Iterator[Trials]:
    """Trials that are counted together; at the end the count is recorded, and the first failure raised.

    Args:
        promise: a short name such as "checkpoint-kill", by which the page finds its counts.
        what: what is tried, in words.
    """
    trials = Trials()
    yield trials
    record(promise, what, tried=trials.tried, survived=trials.tried - len(trials.failures))
    if trials.failures:
        name, error = trials.failures[0]
        raise AssertionError(
            f"{len(trials.failures)} of {trials.tried} failed, the first at {name}: {error}"
        ) from error


def record(promise: str, what: str, *, tried: int, survived: int, test: str | None = None) -> None:
    """Write one count: of what was tried how much was survived. Nothing is written where no file is named.

    `test` is the one that is running, where it is not given.
    """
    name = os.environ.get(FILE_VARIABLE)
    if not name:
        return
    entry = {
        "promise": promise,
        "what": what,
        "tried": tried,
        "survived": survived,
        "test": test or os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with open(ROOT / name, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        kept = [other for other in map(json.loads, file) if not _is_replaced(other, entry)]
        file.truncate(0)
        file.writelines(json.dumps(line) + "\n" for line in sorted([*kept, entry], key=_key))


class Cases:
    """The cases of each test that were run, for tests that count nothing themselves."""

    def __init__(self) -> None:
        self._outcomes: dict[str, list[bool]] = {}

    def see(self, report: pytest.TestReport) -> None:
        """Take note of what came out of a case; one that was left out is none."""
        if report.failed or (report.when == "call" and report.passed):
            self._outcomes.setdefault(report.nodeid.partition("[")[0], []).append(report.passed)

    def record(self, named: set[str]) -> None:
        """Write how many cases of each test in `named` were run, and how many passed."""
        name = os.environ.get(FILE_VARIABLE)
        if not name:
            return
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines() if (ROOT / name).exists() else []
        counted = {entry["test"].partition("[")[0] for entry in map(json.loads, lines) if entry["what"] != CASES}
        for test in sorted(named & self._outcomes.keys() - counted):
            outcomes = self._outcomes[test]
            record("", CASES, tried=len(outcomes), survived=sum(outcomes), test=test)


def _is_replaced(other: dict, entry: dict) -> bool:
    """Whether a line says what the new one does, or is of a former way of its test to count.

    A test may have counted only its cases, and all of what its cases now count one by one, or the other way round.
    """
    same_test = other["test"].partition("[")[0] == entry["test"].partition("[")[0]
    in_parts = ("[" in other["test"]) != ("[" in entry["test"])
    return _key(other) == _key(entry) or (same_test and (other["what"] == CASES != entry["what"] or in_parts))


def _key(entry: dict) -> tuple[str, str, str]:
    return entry["promise"], entry["test"], entry["what"]


def _commit() -> str:
    """The commit of this checkout, marked when tracked files differ from it; "" outside a checkout."""
    answers = [
        subprocess.run(["git", "-C", ROOT, *words], check=False, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    ]
    # The counts themselves are written while the tests run.
    changed = [line for line in answers[1].splitlines() if "reliability_counts.json" not in line]
    return answers[0] + (" (modified)" if changed else "")
