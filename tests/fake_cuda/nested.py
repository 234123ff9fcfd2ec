"""What lies in an operator's arguments and results: tuples, lists and dicts, as PyTorch's pytree does it for any type.

Every operator of a step comes here several times, and pytree takes longer than all of the operator.
"""

from collections.abc import Callable
from typing import Any


def leaves(value: Any) -> list[Any]:
    """All that is no tuple, list or dict, in order."""
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in leaves(part)]
    if isinstance(value, dict):
        return leaves(list(value.values()))
    return [value]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same with `function` of every leaf in its place."""
    if isinstance(value, tuple | list):
        return type(value)([mapped(function, part) for part in value])
    if isinstance(value, dict):
        return {key: mapped(function, part) for key, part in value.items()}
    return function(value)
