"""CUDA sources as C++ that g++ reads.

Rewritten are launches, `__shared__` variables, the beginnings of kernels, and where memory comes from. Everything else
of CUDA that a source has must be declared in include/. What is neither is an error that names file and line, so that
nothing is compiled with another meaning than CUDA's. Lines keep their numbers.
"""

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

INCLUDE = Path(__file__).parent / "include"
MAX_THREADS = "1024"  # of a kernel without __launch_bounds__

# A kernel's name (a function, or a pointer to one) and template arguments, then what says how to launch it.
LAUNCH = re.compile(r"(?P<kernel>\b[A-Za-z_]\w*(?:<[^<>;{}()]*>)?)\s*(?P<open><<<)[^;]*?(?P<close>>>>)\s*\(")
SHARED = re.compile(r"__shared__\s+(?P<type>[\w:]+(?:<[\w:, ]*>)?)\s+(?P<name>\w+)\s*(?P<dims>(?:\[[^\]]+\])*)\s*;")
GLOBAL = re.compile(r"\b__global__\b")
LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\s*\(")
DATA_POINTER = re.compile(r"\b(?P<tensor>\w+)\.(?P<function>(?:const|mutable)_data_ptr)\(\)")
RENAMED = {
    "aoti_torch_empty_strided": "cuda_on_cpu::empty_strided",
    "torch::stable::accelerator::DeviceGuard": "cuda_on_cpu::Op",
    "STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA,": "STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU,",
}

# Words that CUDA may give a meaning: reserved ones, its libraries', and the functions without a mark of their own.
CUDA_WORD = re.compile(
    r"\b(?:__\w+|cu[A-Z]\w*|cuda[A-Z]\w*|atomic\w+|warpSize|clock(?:64)?|tex\dD\w*|surf\dD\w*|cooperative_groups|nvcuda"
    r"|cub|thrust|half2?|nv_bfloat16\d?)\b"
)
OF_THE_COMPILER = {"__attribute__", "__restrict__", "__FILE__", "__LINE__"}
STABLE_NAME = re.compile(r"\btorch::stable::[\w:]+")
STABLE_NAMES = {
    "torch::stable::Tensor", "torch::stable::contiguous", "torch::stable::detail::from", "torch::stable::detail::to",
    "torch::stable::transpose", *RENAMED,
}  # fmt: skip
ASM = re.compile(r"\basm\b(?:\s+volatile)?\s*\(\s*(?P<template>\"[^\"]*\")?")
EXTERN_SHARED = re.compile(r"\bextern\s+__shared__")
INCLUDED = re.compile(r"^[ \t]*#[ \t]*include[ \t]*(?P<name>[<\"][^>\"]+[>\"])", re.MULTILINE)


class UnknownConstruct(Exception):
    """Something of CUDA that neither the translator nor include/ knows."""


def translate_all(sources: list[str], read: Callable[[str], str]) -> dict[str, str]:
    """Sources and the files they include by `#include "..."`, translated.

    Args:
        sources: paths relative to the repository, as CMakeLists.txt has them.
        read: the text of such a path.
    """
    translated, waiting = {}, list(sources)
    while waiting:
        path = waiting.pop()
        if path in translated:
            continue
        text = read(path)
        translated[path] = translate(text, path)
        names = (found["name"] for found in INCLUDED.finditer(text))
        ours = (name.strip('"') for name in names if name.startswith('"'))
        waiting.extend(os.path.normpath(Path(path).parent / name) for name in ours)
    return translated


def translate(text: str, path: str) -> str:
    """One file. `path` is for messages.

    Raises:
        UnknownConstruct: with path, line and what to do.
    """
    code = _without_comments_and_strings(text)
    edits: list[tuple[int, int, str]] = []  # begin and end in `text`, and what comes there
    for found in LAUNCH.finditer(code):
        kernel = found["kernel"]
        edits += [
            (*found.span("kernel"), f"cuda_on_cpu::launch([&](auto... arguments) {{ {kernel}(arguments...); }}"),
            (*found.span("open"), ", "),
            (*found.span("close"), ")"),
        ]
    for found in SHARED.finditer(code):
        name, variable = found["name"], f"{found['name']}_of_block"
        shared = f"cuda_on_cpu::shared<{found['type']}{found['dims']}>(&{variable})"
        edits.append((*found.span(), f"static char {variable}; auto& {name} = {shared};"))
    for found in GLOBAL.finditer(code):
        _, bound, begin = _kernel_at(code, found.end())
        if begin is not None:
            edits.append((begin, begin, f" cuda_on_cpu::enter_kernel({bound});"))
    for found in DATA_POINTER.finditer(code):
        edits.append((*found.span(), f"cuda_on_cpu::{found['function']}({found['tensor']})"))
    for old, new in RENAMED.items():
        edits += [(*found.span(), new) for found in re.finditer(rf"{re.escape(old)}(?!\w)", code)]
    _check(text, code, edits, path)
    for begin, end, new in sorted(edits, reverse=True):
        text = text[:begin] + new + text[end:]
    return text


def kernel_names(text: str) -> set[str]:
    """Of the kernels that a source declares."""
    code = _without_comments_and_strings(text)
    return {_kernel_at(code, found.end())[0] for found in GLOBAL.finditer(code)}


@cache
def known_words() -> frozenset[str]:
    """What include/ declares, the translator rewrites or the compiler has."""
    declared = "\n".join(path.read_text() for path in sorted(INCLUDE.iterdir()))
    return frozenset(CUDA_WORD.findall(declared)) | OF_THE_COMPILER | {"__shared__", "__launch_bounds__", "__global__"}


def _check(text: str, code: str, edits: list[tuple[int, int, str]], path: str) -> None:
    def rewritten(position: int) -> bool:
        return any(begin <= position < end for begin, end, _ in edits)

    def refuse(position: int, what: str, remedy: str) -> None:
        line = code.count("\n", 0, position) + 1
        raise UnknownConstruct(f"{path}:{line}: {what}; {remedy}")

    teach = "teach tests/cuda_on_cpu/translate.py"
    for found in EXTERN_SHARED.finditer(code):
        refuse(found.start(), "dynamic shared memory", teach)
    for word, what in (("__shared__", "a shared variable"), ("<<<", "a launch"), ("data_ptr", "a data pointer")):
        for found in re.finditer(word, code):
            if not rewritten(found.start()):
                refuse(found.start(), f"{what} in a form that the translator does not know", teach)
    for found in CUDA_WORD.finditer(code):
        if found[0] not in known_words():
            refuse(found.start(), f"`{found[0]}` is not known", "declare it in tests/cuda_on_cpu/include")
    for found in STABLE_NAME.finditer(code):
        if found[0] not in STABLE_NAMES:
            refuse(found.start(), f"`{found[0]}` may give memory that the checks do not know", teach)
    for found in ASM.finditer(code):
        if ASM.match(text, found.start())["template"] != '""':
            refuse(found.start(), "inline PTX", "there is no machine to run it on: keep a C++ form beside it")
    for found in INCLUDED.finditer(text):
        name = found["name"].strip('<>"')
        is_standard = "." not in name or name.startswith("torch/")
        if found["name"].startswith("<") and not is_standard and not (INCLUDE / name).is_file():
            refuse(found.start(), f"{found['name']} is not known", "put what is needed into tests/cuda_on_cpu/include")


def _kernel_at(code: str, position: int) -> tuple[str, str, int | None]:
    """Name and most threads of the kernel after `__global__`, and where its body begins (None: a declaration)."""
    name, bound = "", MAX_THREADS
    while code[position] not in "{;":
        if found := LAUNCH_BOUNDS.match(code, position):
            end = _closing(code, found.end() - 1)
            bound = _first_argument(code[found.end() : end])
            position = end
        elif code[position] == "(":
            name = re.search(r"(\w+)\s*$", code[:position])[1]
            position = _closing(code, position)
        position += 1
    return name, bound, position + 1 if code[position] == "{" else None


def _closing(code: str, begin: int) -> int:
    """The position of the parenthesis that closes the one at `begin`."""
    depth = 0
    for position in range(begin, len(code)):
        depth += {"(": 1, ")": -1}.get(code[position], 0)
        if depth == 0:
            return position
    raise ValueError("a parenthesis is not closed")


def _first_argument(arguments: str) -> str:
    depth = 0
    for position, character in enumerate(arguments):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            return arguments[:position]
    return arguments


def _without_comments_and_strings(text: str) -> str:
    """The text with spaces in place of comments and of what strings hold: positions and lines stay."""
    parts = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
    return parts.sub(lambda found: re.sub(r"[^\n\"]", " ", found[0]), text)
