"""Reading of files that somebody else may have written: whatever is in them, only a `UserError` comes out."""

import csv
import json
import math
import os
import stat
import struct
import tokenize
import types
import typing
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError

from sendvae_fast.errors import UserError

T = TypeVar("T")
MAX_BYTES = 2**28
"""A larger text file is refused; the metrics of four million steps are a tenth of it."""
MAX_NODES = 1_000_000
"""Values in a YAML or JSON file with its aliases written out; a few lines of aliases can stand for billions."""


_DAMAGE = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, SafetensorError, csv.Error,
)  # fmt: skip
"""What the code that takes a file's content apart raises where it is not what it should be."""

_DAMAGED_ARCHIVE = (
    EOFError, RuntimeError, SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What zipfile raises (RuntimeError: encrypted) and NumPy, which reads the header of an array as Python."""


@contextmanager
def reading(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Context in which a file's content is read and taken apart: what damage there raises becomes a `UserError`.

    Args:
        path: the file, for the message.
        remedy: what the user can do about a damaged one: "make it again with `sendvae data index`".
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(path)} ({error.strerror or error}): {remedy}") from error
    except _DAMAGE as error:
        raise UserError(f"{os.fspath(path)} is damaged, or no file of its kind ({_reason(error)}): {remedy}") from error


@contextmanager
def reading_zip(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """`reading` of an archive or an array: npz, npy."""
    with reading(path, remedy):
        try:
            yield
        except _DAMAGED_ARCHIVE as error:
            raise NotOfItsKind(str(error)) from error


class NotOfItsKind(ValueError):
    """The content of a file is no content of its kind; the message says in plain words why."""


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text at byte {error.start}"
    if isinstance(error, KeyError):
        return f"no entry {error}"
    words = str(error) if isinstance(error, NotOfItsKind) else f"{type(error).__name__}: {error}"
    return " ".join(words.split())[:200]


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file open for reading. OSError where it is missing, not readable, or no regular file: a FIFO waits for ever."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a regular UTF-8 file.

    Raises:
        OSError: it is missing, not readable, no regular file, or too large.
        ValueError: it is not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise OSError(f"{size} bytes are too many for a text file")
        return file.read().decode("utf-8")


def read_json(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """The object in a JSON file. UserError, ending with `remedy`, where there is none."""
    with reading(path, remedy):
        return _checked(json.loads(read_text(path)))


def read_yaml(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file. UserError, ending with `remedy`, where there is none."""
    import yaml  # settings need it; weights and latents, which are all that a library's user reads, do not

    with reading(path, remedy):
        try:
            return _checked(yaml.safe_load(read_text(path)) or {})  # in Python: the C parser's stack can overflow
        except yaml.YAMLError as error:
            raise NotOfItsKind(f"not valid YAML: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without its lines that are none: a crash may have cut one off.

    Raises OSError where the file cannot be read.
    """
    return [found for line in read_text(path).splitlines() if (found := _object(line)) is not None]


def last_json_line(path: Path) -> dict[str, Any] | None:
    """The last object of a JSON-lines file, None where it has none. Raises OSError where the file cannot be read."""
    return next(
        (found for line in reversed(read_text(path).splitlines()) if (found := _object(line)) is not None), None
    )


def _object(line: str) -> dict[str, Any] | None:
    try:
        return _checked(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None


def names_key(path: Path, key: str) -> bool:
    """Whether a JSON file is there and names a key. It is not parsed: damage is for who reads it then."""
    return path.is_file() and f'"{key}"' in path.read_text(encoding="utf-8", errors="replace")


def dataclass_of(kind: type[T], content: dict[str, Any]) -> T:
    """An instance of a dataclass of plain values from a read mapping; its own checks raise what they raise.

    Raises NotOfItsKind where the mapping has a key that is no field, or a value of another type than the field's.
    """
    hints = typing.get_type_hints(kind)
    for name, value in content.items():
        if name not in hints:
            raise NotOfItsKind(f"{kind.__name__} has no field {name!r:.80}")
        if not _is_of(value, hints[name]):
            raise NotOfItsKind(f"{name} is {value!r:.40}")
    return kind(**content)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value that JSON can hold is one for a field of this annotation."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:  # of any length: tuple[int, ...]
        return isinstance(value, (list, tuple)) and all(_is_of(part, parts[0]) for part in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if isinstance(value, int) and abs(value) >= 2**31:  # no size of a network; torch takes such numbers for other types
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def count_in(content: dict[str, Any], name: str) -> int:
    """The count `name` of a read mapping: a whole number from 0 to 2^53. NotOfItsKind where it is none."""
    value = content[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**53:
        raise NotOfItsKind(f"{name} is {value!r:.40} and should be a count")
    return value


def numbers_in(content: dict[str, Any]) -> dict[str, float]:
    """A read mapping of names to finite numbers. NotOfItsKind where a value is none."""
    for name, value in content.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < math.inf:
            raise NotOfItsKind(f"{name!r:.40} is {value!r:.40} and should be a number")
    return content


def _checked(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise NotOfItsKind(f"a mapping of names is expected, not a {type(content).__name__}")
    if _num_nodes(content, {}) > MAX_NODES:
        raise NotOfItsKind(f"more than {MAX_NODES} values")
    return content


def _num_nodes(value: Any, known: dict[int, int]) -> int:
    """Values in a tree, every alias counted as often as it stands there. ValueError where one contains itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = -1
        children = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_nodes(child, known) for child in children)
    if known[id(value)] < 0:
        raise NotOfItsKind("an alias contains itself")
    return known[id(value)]
