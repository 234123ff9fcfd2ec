"""Builds the CUDA kernels of one op, translated, into a library that torch loads in place of the op's CPU form.

Everything lies in build/cuda_on_cpu under names with a hash of what went into it, so that nothing is compiled twice.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from cuda_on_cpu.translate import kernel_names, translate_all

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_cpu"
OLDEST_GCC = 12  # the first with _Float16 in C++

COMMON_FLAGS = ("-std=c++20", "-fPIC", "-g1", "-w", "-fvisibility=hidden", f"-I{HERE / 'include'}")
OP_FLAGS = ("-Og", "-DUSE_CUDA")
HEADER = "cuda_on_cpu.h"
FUSED, UNFUSED = ("-mfma", "-ffp-contract=fast"), ("-ffp-contract=off",)  # nvcc fuses unless told not to
CHECKS = (
    "-fno-tree-sra",  # a vector of 16 bytes stays one access
    "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,shift,integer-divide-by-zero", "-fno-sanitize-recover=all",
)  # fmt: skip
KINDS = {"plain": (), "checked": CHECKS}


class BuildError(Exception):
    """g++ took something not; the message has its own."""


def reason_not_to_build() -> str | None:
    """Why this machine cannot build the kernels, or None."""
    if platform.machine() != "x86_64":
        return f"the runtime changes stacks on x86-64 alone, this is {platform.machine()}"
    missing = [tool for tool in ("g++", "nm", "addr2line") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found"
    if " fma " not in Path("/proc/cpuinfo").read_text():
        return "this processor cannot fuse products and sums"
    version = _output("g++", "-dumpversion")
    if int(version.split(".")[0]) < OLDEST_GCC:
        return f"g++ {version.strip()} is older than {OLDEST_GCC}"
    return None


@cache
def cuda_sources() -> dict[str, bool]:
    """The CUDA sources in CMakeLists.txt, and whether products and sums are fused."""
    text = (ROOT / "CMakeLists.txt").read_text()
    lists = {name: re.search(rf"^set\({name}\n([^)]*)\)", text, re.MULTILINE) for name in _LISTS}
    return {path: _LISTS[name] for name, found in lists.items() for path in found[1].split()}


_LISTS = {"SENDVAE_CUDA_SOURCES": True, "SENDVAE_UNFUSED_CUDA_SOURCES": False}


def ops() -> list[str]:
    """The ops that have CUDA kernels."""
    return sorted({Path(path).parent.name for path in cuda_sources()})


def read_source(path: str) -> str:
    """The text of a source, by its name in CMakeLists.txt."""
    return (ROOT / path).read_text()


def schema_library() -> Path:
    """The library of all schemas, without any implementation."""
    source = "csrc/library.cpp"
    return _link("schemas", [_compile("schemas", {source: read_source(source)}, _torch_flags())])


def op_library(op: str, kind: str, read: Callable[[str], str] | None = None) -> Path:
    """The op's kernels under g++.

    Args:
        kind: "plain", or "checked" with every access checked.
        read: gives the text of a source in place of the repository's.

    Raises:
        UnknownConstruct, BuildError
    """
    sources = [path for path in cuda_sources() if Path(path).parent.name == op]

    flags = (*_torch_flags(), *OP_FLAGS, *KINDS[kind])
    fused = (*_precompiled_header((*flags, *FUSED)), *flags, *FUSED)
    unfused = ("-include", HEADER, "-x", "c++", *flags, *UNFUSED)

    def compiled(path: str) -> Path:
        translated = translate_all([path], read or read_source)
        return _compile(f"{Path(path).stem}-{kind}", translated, fused if cuda_sources()[path] else unfused)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
    # The runtime first: of inline functions in both, the linker takes its copies, which are not instrumented.
    return _link(f"{op}-{kind}", [_runtime(), *objects])


def kernels(library: Path) -> dict[int, str]:
    """Address and name of every kernel that a library has, each instantiation of a template for itself."""
    declared = {name for path in cuda_sources() for name in kernel_names(read_source(path))}
    found = {}
    for line in _output("nm", "-C", "--defined-only", str(library)).splitlines():
        address, symbol, name = line.split(maxsplit=2)
        kernel = re.search(r"::(\w+)(<.*>)?\(.*\)$", name.replace("(anonymous namespace)::", ""))
        if symbol in "tT" and kernel and kernel[1] in declared:
            found[int(address, 16)] = kernel[1] + (kernel[2] or "").replace("sendvae::", "")
    return found


# ---- Steps ----


@cache
def _runtime() -> Path:
    """The runtime as one object: its parts share most of what they include."""
    parts = {f"runtime/{path.name}": path.read_text() for path in sorted((HERE / "runtime").iterdir())}
    whole = "".join(f'#include "{path}"\n' for path in parts if path.endswith(".cpp"))
    return _compile("runtime", {"runtime.cpp": whole, **parts}, ("-O2",))


@cache
def _precompiled_header(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Flags that include cuda_on_cpu.h as g++ has read it once: it has torch's headers, a second of every source."""
    folder = BUILD / f"header-{_hash(_environment(), repr(flags))}"
    target = folder / f"{HEADER}.gch"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make(target, "g++", *COMMON_FLAGS, *flags, "-x", "c++-header", str(HERE / "include" / HEADER))
    return f"-I{folder}", "-include", HEADER, "-x", "c++"


@cache
def _torch_flags() -> tuple[str, ...]:
    target = re.search(r'TARGET_VERSION_HEX "(\w+)"', (ROOT / "CMakeLists.txt").read_text())[1]
    return "-isystem", f"{torch.__path__[0]}/include", f"-DTORCH_TARGET_VERSION={target}"


@cache
def _environment() -> str:
    """What all objects depend on besides their sources and flags."""
    headers = [path.read_text() for path in sorted((HERE / "include").iterdir())]
    return "\n".join((_output("g++", "--version"), torch.__version__, *headers))


def _compile(name: str, files: dict[str, str], flags: Sequence[str]) -> Path:
    """The object of the first of the files, which lie in a folder of their own."""
    source = next(iter(files))
    flags = (*flags, *COMMON_FLAGS)
    folder = BUILD / f"{name}-{_hash(_environment(), repr(sorted(files.items())), repr(flags))}"
    target = folder / "object.o"
    if not target.exists():
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        _make(target, "g++", *flags, "-c", str(folder / source))
    return target


def _link(name: str, objects: list[Path]) -> Path:
    target = BUILD / f"{name}-{_hash(*map(str, objects))}.so"
    torch_library = Path(torch.__path__[0], "lib", "libtorch_cpu.so")
    if not target.exists():
        libraries = (str(torch_library), "-ldl", "-Wl,-Bsymbolic", "-Wl,--no-undefined")
        _make(target, "g++", "-shared", *map(str, objects), *libraries)
    return target


def _make(target: Path, *command: str) -> None:
    """Run a command that writes the target, in one step as others see it."""
    unfinished = target.with_suffix(f".{os.getpid()}")
    result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if " error: " in line or "undefined reference" in line]
        message = "\n".join(line.replace(f"{target.parent}/", "") for line in lines[:5]) or result.stderr[-2000:]
        raise BuildError(f"{message}\nWhat CUDA has and g++ does not is declared in tests/cuda_on_cpu/include.")
    unfinished.rename(target)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
