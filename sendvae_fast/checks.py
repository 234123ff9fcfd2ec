"""Checks of a config dataclass's values: `UserError` with one line, "loop.num_steps is 0: it must be at least 1".

`names` are the dataclass's fields; None means "not given" and passes; NaN fails. `where` is the section that
the fields have in a config file, `hint` follows the rule.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

from sendvae_fast.errors import UserError

ADDED_LATER = "added_later"
"""Metadata of a field that older runs do not have: at its default it is none of the settings that must be the same."""


def at_least(least: float, config: Any, *names: str, where: str = "", hint: str = "") -> None:
    """Values that are `least` or more."""
    _check(lambda value: value >= least, f"at least {least}{hint}", config, names, where)


def above(bound: float, config: Any, *names: str, where: str = "", hint: str = "") -> None:
    """Finite values that are more than `bound`."""
    _check(lambda value: bound < value < math.inf, f"above {bound}{hint}", config, names, where)


def weights(config: Any, *names: str, where: str = "", hint: str = "") -> None:
    """Weights of losses: finite, and not below 0."""
    _check(lambda value: 0 <= value < math.inf, f"a finite number of at least 0{hint}", config, names, where)


def in_interval(interval: str, config: Any, *names: str, where: str = "", hint: str = "") -> None:
    """Values in an interval such as "[0, 1)": a bracket includes its end, a parenthesis excludes it."""
    low, high = map(float, interval[1:-1].split(","))

    def is_inside(value: float) -> bool:
        return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")

    _check(is_inside, f"in {interval}{hint}", config, names, where)


def seeds(config: Any, *names: str, where: str = "") -> None:
    """Seeds of random numbers, which Philox and torch take as 63 bits."""
    _check(lambda value: 0 <= value < 2**63, "at least 0 and below 2**63", config, names, where)


def paths(config: Any, *names: str, where: str = "") -> None:
    """Files and folders to write: an empty path would be the current folder."""
    _check(lambda value: bool(str(value).strip()), "the path of a file or folder", config, names, where)


def weight_paths(config: Any, *names: str, where: str = "") -> None:
    """Files and folders to write tensors to: `paths` in UTF-8, because safetensors reads no others."""
    paths(config, *names, where=where)
    _check(is_utf8, "a path in UTF-8, because safetensors reads no others", config, names, where)


def is_utf8(path: Any) -> bool:
    """Whether the bytes of a path are UTF-8; Python holds others as lone surrogates."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def choices(config: Any, where: str = "") -> None:
    """Every field annotated ``Literal[...]`` holds one of the values listed there."""
    for name, annotation in typing.get_type_hints(type(config)).items():
        if typing.get_origin(annotation) is Literal:
            allowed = typing.get_args(annotation)
            *first, last = map(str, allowed)
            _check(allowed.__contains__, f"{', '.join(first)} or {last}", config, [name], where)


def _check(is_right: Callable[[Any], bool], rule: str, config: Any, names: Iterable[str], where: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not is_right(value):
            raise UserError(f"{where}{'.' if where else ''}{name} is {value!r}: it must be {rule}")
