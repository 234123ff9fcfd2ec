"""Configs: nested dataclasses, read from YAML with dotted overrides, strict about every key.

A config is named by its path, or, if it comes with the package, by its name: `vae/send_vae_f16d32`. A file may start
from another one with `base: other.yaml` (relative to itself, or a packaged name); its own keys win. An override is
`--data.image_size=256` or `--data.image_size 256`.
"""

import copy
import dataclasses
import difflib
import enum
import functools
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from sendvae_fast.errors import UserError
from sendvae_fast.reading import read_yaml, reading

T = TypeVar("T")
# jsonargparse's words for a value that is none of the types of `X | None`.
_UNION_ERROR = re.compile(
    r"(?P<key>key \".*?\"): Does not validate against any of the Union subtypes Subtypes: .*? Errors: - "
    r"(?P<problems>.*) Given value type: .*? Given value: (?P<value>.*)"
)
_IN_PACKAGE = Path(__file__).parent / "configs"
CONFIGS = _IN_PACKAGE if _IN_PACKAGE.is_dir() else Path(__file__).parents[1] / "configs"
"""The packaged configs: an installed package holds them, a checkout has them beside the package."""


def packaged_configs() -> dict[str, Path]:
    """The configs that come with the package, by name: `vae/send_vae_f16d32`."""
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))}


def find_config(name: str | Path, folder: Path = Path()) -> Path:
    """The config file called `name`: a path (from `folder`) that exists, else a packaged config, `.yaml` or not.

    Raises UserError with the nearest names where there is neither.
    """
    path = folder / name
    packaged = packaged_configs()
    known = str(name).removesuffix(".yaml")
    if path.is_file() or (known not in packaged and path.exists()):
        return path
    if known in packaged:
        return packaged[known]
    near = [full for full in packaged if full.split("/")[-1] == known.split("/")[-1]]
    near += [full for full in difflib.get_close_matches(known, packaged, n=3, cutoff=0.5) if full not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else "`sendvae config list` lists the packaged ones"
    raise UserError(f"cannot read the config {path}: it is neither a file nor a packaged config; {hint}")


def read_config(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The nested dict in `path`, merged over its `base` file if it names one; `above` are the files it is the base of.

    UserError where a file cannot be read, is no mapping in YAML, or is its own base.
    """
    if path.resolve() in above:
        raise UserError(f"the config {path} is its own `base`, directly or through others: take one of them out")
    content = read_yaml(path, "give a YAML file of `key: value` pairs")
    base = content.pop("base", None)
    if base is None:
        return content
    with reading(path, "give `base` the path or the name of another config"):
        below = find_config(base, path.parent)
    return merge(read_config(below, (*above, path.resolve())), content)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with every key of `above` put over it, dict by dict."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def parse_overrides(arguments: list[str], flags: frozenset[str] = frozenset()) -> dict[str, Any]:
    """`["--a.b=1", "--c", "2"]` as `{"a": {"b": "1"}, "c": "2"}`; values stay text until the dataclass types them.

    Dashes in a key read as underscores. A key in `flags` needs no value: alone it means true.
    """
    nested: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}; options look like --key.subkey=value")
        key, equals, value = argument[2:].partition("=")
        key = key.replace("-", "_")
        if not equals and pending and not pending[0].startswith("--"):
            value = pending.pop(0)
        elif not equals and key in flags:
            value = "true"
        elif not equals:
            raise UserError(f"--{key} needs a value, as in --{key}=VALUE")
        nested = merge(nested, _nest(key.split("."), value))
    return nested


def flag_keys(config_class: type) -> frozenset[str]:
    """The top-level boolean keys of a config dataclass, which the command line takes without a value."""
    return frozenset(name for name, kind in typing.get_type_hints(config_class).items() if kind is bool)


def takes_several(config_class: type, name: str) -> bool:
    """Whether a field of a config dataclass holds several values: a tuple or a list."""
    return typing.get_origin(typing.get_type_hints(config_class)[name]) in (tuple, list)


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nest(keys[1:], value) if len(keys) > 1 else value}


def build_config(config_class: type[T], content: dict[str, Any], where: str = "the config") -> T:
    """An instance of the dataclass `config_class` from a nested dict, types checked.

    Raises UserError naming the key that is unknown (and the nearest known one), missing, or of the wrong type.
    """
    _check_keys(config_class, content, prefix="", where=where)
    parser = _parser_of(config_class)
    try:
        return config_class(**vars(parser.instantiate(parser.parse_object(copy.deepcopy(content)))))
    except (ArgumentError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        # jsonargparse wraps the error of a nested __post_init__; the user is shown the check's own line.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{where}: {_one_line(error)}") from error


@functools.cache
def _parser_of(config_class: type) -> ArgumentParser:
    """Made once: reading the signatures of all nested dataclasses takes longer than reading a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def load_config(config_class: type[T], files: list[Path], overrides: dict[str, Any]) -> T:
    """Read `files` in order, each over the one before, then `overrides`, into an instance of `config_class`."""
    where = " + ".join(str(file) for file in files) or "the command line"
    return build_config(config_class, merge(read_files(files), overrides), where)


def read_files(files: list[Path]) -> dict[str, Any]:
    """The content of several configs, paths or packaged names, each over the one before."""
    content: dict[str, Any] = {}
    for file in files:
        content = merge(content, read_config(find_config(file)))
    return content


def required_keys(config_class: type, value: Any) -> dict[str, Any]:
    """A nested dict that gives `value` to every key of `config_class` that has no default."""
    types_by_name = typing.get_type_hints(config_class)
    nested: dict[str, Any] = {}
    for item in dataclasses.fields(config_class):
        if item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING:
            continue
        inner = nested_dataclass(types_by_name[item.name])
        nested[item.name] = value if inner is None else required_keys(inner, value)
    return nested


def nested_dataclass(annotation: Any) -> type | None:
    """The dataclass in `X` or `X | None`, if any."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _check_keys(config_class: type, content: dict[str, Any], prefix: str, where: str) -> None:
    types_by_name = typing.get_type_hints(config_class)
    known = [field.name for field in dataclasses.fields(config_class)]
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        nested = nested_dataclass(types_by_name[key])
        if nested is not None and isinstance(value, dict):
            _check_keys(nested, value, f"{prefix}{key}.", where)
        several = _dataclass_of_several(types_by_name[key])
        if several is not None and isinstance(value, list | tuple):
            for number, part in enumerate(value):
                if not isinstance(part, dict):
                    keys = ", ".join(field.name for field in dataclasses.fields(several))
                    raise UserError(f"{where}: {prefix}{key}[{number}] is {part!r}; give it keys of {keys}")
                _check_keys(several, part, f"{prefix}{key}[{number}].", where)


def _dataclass_of_several(annotation: Any) -> type | None:
    """The dataclass X of a field that holds a tuple or list of X, if it is one."""
    if typing.get_origin(annotation) not in (tuple, list):
        return None
    return nested_dataclass(typing.get_args(annotation)[0])


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()).replace("Parser key ", "key ")
    line = line.replace("Expected a <class 'tuple'>", "Expected a list in brackets, as [1,2]")
    union = _UNION_ERROR.fullmatch(line)
    if union is None:
        return line
    # For `X | None` the user is told only why the value is no X.
    problems = [re.sub(r"^Problem with given class_path '.*?': ", "", text) for text in union["problems"].split(" - ")]
    told = "; ".join(text for text in problems if text != "Expected a <class 'NoneType'>")
    value = "" if union["value"].startswith(("Namespace(", "{")) else f". Got value: {union['value']}"
    return f"{union['key']}: {told}{value}"


def plain(value: Any) -> Any:
    """Dataclasses, enums, paths and tuples as the dicts, strings and lists that YAML and JSON have."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    return str(value) if isinstance(value, os.PathLike) else value
