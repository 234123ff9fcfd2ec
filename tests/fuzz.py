"""Damaged copies of a file: bytes changed, cut or added, and, of JSON and YAML, values of other types in any place."""

import copy
import json
import os
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml
from everything import EVERYTHING
from reliability_counts import record

from sendvae_fast.errors import UserError

TIMES = int(os.environ.get("SENDVAE_FUZZ", "60" if EVERYTHING else "6"))
"""Damaged copies of each file."""
ENOUGH = 24
"""Copies among which there is one that a reader of text must notice."""

JUNK = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    "",
    "x" * 300,
    "\ud800",
    "1",
    [],
    [[]],
    {},
    {"": None},
    ["a", 1],
)


class Reader(NamedTuple):
    """A file of a folder, how a copy of it is damaged, and what reads the folder."""

    file: str
    damage: Callable[[Path, random.Random], bytes]
    read: Callable[[Path], object]


def check_reader(name, reader, folder):
    """Whatever happens to the file, its reader takes it or raises a `UserError` of one line."""
    path, draw = folder / reader.file, random.Random(name)
    sound = path.read_bytes()
    reader.read(folder)
    messages, tried, is_text = [], 0, reader.damage is not damaged_content
    try:
        while tried < TIMES or (is_text and not messages and tried < ENOUGH):
            path.write_bytes(sound)
            content = reader.damage(path, draw)
            path.write_bytes(content)
            tried += 1
            try:
                reader.read(folder)
            except UserError as error:
                messages.append(str(error))
            except Exception as error:
                raise AssertionError(f"{type(error).__name__} by {content[:300]!r}") from error
    finally:
        path.write_bytes(sound)
    assert messages or not is_text, "a damaged text file is noticed"
    assert all(message.isprintable() for message in messages)
    record("damage", f"damaged copies: {name}", tried=tried, survived=tried)


def damaged_content(path, draw):
    """A damaged copy of a file of any kind."""
    return damaged_bytes(path.read_bytes(), draw)


def damaged_bytes(content, draw):
    """`content` with a few bytes changed, cut off, doubled or added, or something else altogether."""
    kind = draw.randrange(6)
    if kind == 0:
        return content[: draw.randrange(len(content) + 1)]
    if kind == 1:
        return draw.randbytes(draw.randrange(200))
    if kind == 2:
        return b"[" * draw.choice([10, 10, 10, 10, 10, 100_000])  # for YAML a second of work
    place = draw.randrange(len(content) + 1)
    if kind == 3:
        return content[:place] + draw.randbytes(draw.randrange(1, 9)) + content[place:]
    if kind == 4:
        return content[:place] + content[draw.randrange(len(content) + 1) :]
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 5)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def damaged_tree(tree, draw, junk=()):
    """A copy of nested dicts and lists with one to three entries that are other values, gone, or have other names.

    junk: further values that may be put in.
    """
    junk = (*JUNK, *junk)
    tree = copy.deepcopy(tree)
    for _ in range(draw.randrange(1, 4)):
        places = list(_places(tree))
        if not places:
            return draw.choice(junk)
        holder, key = draw.choice(places)
        kind = draw.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder["".join(draw.choices(string.printable, k=4))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(draw.choice(junk))
    return tree


def damaged_text(path, draw):
    """The bytes of a damaged copy of a JSON or YAML file: half of the copies are sound text of unsound values."""
    content = path.read_bytes()
    if draw.random() < 0.5:
        return damaged_bytes(content, draw)
    if path.suffix == ".json":
        return json.dumps(damaged_tree(json.loads(content), draw)).encode()
    return yaml.safe_dump(damaged_tree(yaml.safe_load(content), draw)).encode("utf-8", "surrogatepass")


def _places(tree):
    """(holder, key) of every entry of nested dicts and lists."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])
