"""What `make test` leaves out and `make test-all` runs: further cells of matrices, each a proof that another repeats.

A whole test or a parameter that is left out has the mark `repeats`, with the test that notices the same faults. What a
fixture or another process does for many tests asks `EVERYTHING`.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

EVERYTHING = os.environ.get("SENDVAE_TESTS") == "all"


def in_turn(values: Sequence[T], number: int) -> tuple[T, ...]:
    """One of the values, another for the next number; with `EVERYTHING` all of them."""
    return tuple(values) if EVERYTHING else (values[number % len(values)],)
