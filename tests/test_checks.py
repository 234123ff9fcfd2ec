"""Checks of config values: what passes, and the one line for what does not."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest

from sendvae_fast import checks
from sendvae_fast.errors import UserError

Colour = Literal["red", "green", "blue"]


@dataclass(kw_only=True)
class Settings:
    number: float | None = 1
    other: float | None = None
    colour: Colour = "red"
    stage: Literal[0, 1] = 0


@pytest.mark.parametrize(
    ("check", "good", "bad", "rule"),
    [
        (lambda *a: checks.at_least(2, *a), [2, 3.5, math.inf, None], [1.999, -math.inf, math.nan], "at least 2"),
        (lambda *a: checks.above(0, *a), [1e-9, 7, None], [0, -1, math.inf, math.nan], "above 0"),
        (checks.weights, [0, 0.5, None], [-1e-9, math.inf, math.nan], "a finite number of at least 0"),
        (lambda *a: checks.in_interval("[0, 1)", *a), [0, 0.999, None], [-0.1, 1, math.nan], r"in \[0, 1\)"),
        (lambda *a: checks.in_interval("(0, 1]", *a), [1e-9, 1], [0, 1.1], r"in \(0, 1\]"),
        (checks.seeds, [0, 2**63 - 1, None], [-1, 2**63], r"at least 0 and below 2\*\*63"),
    ],
    ids=["at least", "above", "weights", "closed below", "closed above", "seeds"],
)
def test_ranges(check, good, bad, rule):
    for value in good:
        check(Settings(number=value), "number", "other")
    for value in bad:
        with pytest.raises(UserError, match=f"^number is {value}: it must be {rule}$"):
            check(Settings(number=value), "other", "number")


def test_a_path_to_write_to_is_given():
    checks.paths(Settings(colour="blue"), "colour")
    with pytest.raises(UserError, match="^colour is ' ': it must be the path of a file or folder$"):
        checks.paths(Settings(colour=" "), "colour")


def test_section_and_hint_are_told():
    with pytest.raises(UserError, match=r"^loop\.number is 0: it must be at least 1 \(no less\)$"):
        checks.at_least(1, Settings(number=0), "number", where="loop", hint=" (no less)")


def test_choices_are_those_of_the_annotation():
    checks.choices(Settings(colour="blue", stage=1))
    with pytest.raises(UserError, match="^paint.colour is 'pink': it must be red, green or blue$"):
        checks.choices(Settings(colour="pink"), where="paint")
    with pytest.raises(UserError, match="^stage is 2: it must be 0 or 1$"):
        checks.choices(Settings(stage=2))
