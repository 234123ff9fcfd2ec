"""The options of a verb, read off its config dataclass: key, kind of value, default, description."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from docstring_parser import parse_from_object

from sendvae_fast.config import nested_dataclass

KINDS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}


@dataclass(frozen=True)
class Option:
    """One key that a verb takes."""

    key: str
    """With dots, as on the command line."""
    section: str
    """The description of the nested config that the option belongs to; empty at the top."""
    kind: str
    """The kind of value after the `=`."""
    description: str
    default: str | None
    """None for an option that is required, or null by default."""
    required: bool


def config_options(config_class: type) -> Iterator[Option]:
    """Every option of a config dataclass, its own before those of nested dataclasses, also of those that are null."""
    yield from _options(config_class, None, prefix="", section="")


def _options(config_class: type, instance: Any, prefix: str, section: str) -> Iterator[Option]:
    hints, descriptions = typing.get_type_hints(config_class), _descriptions(config_class)
    nested = []
    for field in dataclasses.fields(config_class):
        key, description = prefix + field.name, descriptions.get(field.name, "")
        value = getattr(instance, field.name) if instance is not None else _default(field)
        inner = nested_dataclass(hints[field.name])
        if inner is not None:
            nested.append((inner, None if value is dataclasses.MISSING else value, f"{key}.", f"{key}: {description}"))
        else:
            required = value is dataclasses.MISSING
            default = None if required or value is None else _text(value)
            yield Option(key, section, _kind(hints[field.name]), description, default, required and not section)
    for inner in nested:
        yield from _options(*inner)


def _default(field: dataclasses.Field) -> Any:
    """The default of a field, `MISSING` where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _descriptions(config_class: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields, inherited ones included."""
    bases = [base for base in reversed(config_class.__mro__) if dataclasses.is_dataclass(base)]
    found = {item.arg_name: item.description for base in bases for item in parse_from_object(base).params}
    return {name: " ".join((text or "").split()) for name, text in found.items()}


def _kind(annotation: Any) -> str:
    """How a value of this type is written."""
    if isinstance(annotation, types.UnionType):
        return "|".join(_kind(option) for option in typing.get_args(annotation) if option is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (tuple, list):
        inner = [_kind(option) for option in typing.get_args(annotation)]
        return f"[{','.join('...' if kind == '?' else kind for kind in inner)}]"
    return KINDS.get(annotation, "?")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_text, value))}]"
    return str(value)
