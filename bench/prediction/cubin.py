"""The CUDA sources as machine code of an H200: compiled with the build's own flags, and disassembled."""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from bench.machine import ROOT
from bench.prediction.sass import Instruction, parse
from sendvae_fast.errors import UserError

ARCHITECTURE = "90a"
BUILD = ROOT / "build" / "prediction"


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a kernel. Bytes are of a thread, but for shared memory, which is a block's.

    parameters: offset and size in bytes of each. max_threads: of a block, 0 if it has no bound.
    """

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    max_threads: int
    parameters: tuple[tuple[int, int], ...]
    code: tuple[Instruction, ...]


def kernels_of(source: Path) -> list[Kernel]:
    """The kernels that nvcc makes of a .cu file of csrc.

    Raises:
        UserError: no nvcc, cmake or disassembler; a file that is not built or does not compile.
    """
    cubin, report = _compiled(source)
    text = _output(_disassembler(), "-hex", str(cubin))
    code = parse(text)
    names = _demangled(list(code))
    resources = dict(_resources(report))
    return [
        Kernel(names[mangled], **resources[mangled], **_attributes(text, mangled), code=code[mangled])
        for mangled in code
        if mangled in resources
    ]


def _compiled(source: Path) -> tuple[Path, str]:
    """The cubin of a source and what ptxas says of it, made anew when what the preprocessor gives has changed."""
    command = _commands().get(source.resolve())
    if command is None:
        raise UserError(f"{source} is not among the CUDA sources of CMakeLists.txt")
    text = subprocess.run([*command, "-E"], capture_output=True, text=True, check=False)
    if text.returncode:
        raise UserError(f"{source} does not compile: {_first_error(text.stderr)}")
    cubin = BUILD / f"{source.stem}-{_hash(text.stdout, repr(command))}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        result = subprocess.run(
            [*command, "-Xptxas=-v", "-cubin", "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise UserError(f"{source} does not compile: {_first_error(result.stderr)}")
        report.write_text(result.stderr)
    return cubin, report.read_text()


@cache
def _commands() -> dict[Path, list[str]]:
    """nvcc's command line for each CUDA source, as CMake has it, without input and output options."""
    _tool("nvcc")
    result = subprocess.run(
        [
            _tool("cmake"), "-S", str(ROOT), "-B", str(BUILD / "cmake"), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSENDVAE_TORCH_DIR={torch.__path__[0]}", "-DSENDVAE_CUDA=ON",
            f"-DSENDVAE_CUDA_ARCHITECTURES={ARCHITECTURE}-real", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            f"-Dpybind11_DIR={_pybind11()}",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise UserError(f"cmake: {_first_error(result.stderr)}")
    found = {}
    for entry in json.loads((BUILD / "cmake" / "compile_commands.json").read_text()):
        if entry["file"].endswith(".cu"):
            words = shlex.split(entry["command"])
            output = words.index("-o")
            del words[output : output + 2]
            found[Path(entry["file"])] = [word for word in words if word not in ("-c", "-x", "cu")]
    return found


def _pybind11() -> str:
    spec = importlib.util.find_spec("pybind11")
    if spec is None or spec.origin is None:
        raise UserError("pybind11 is not installed: pip install pybind11")
    return str(Path(spec.origin).parent / "share" / "cmake" / "pybind11")


def _tool(name: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(os.environ.get("CUDACXX", name) if name == "nvcc" else name, path=path)
    if found is None:
        raise UserError(f"{name} was not found: predictions need nvcc, cmake, ninja, c++filt (binutils) and nvdisasm")
    return found


def _disassembler() -> str:
    """nvdisasm of the path, else the one in Triton's package."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("triton")
    found = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec and spec.origin else None
    if found is None or not found.exists():
        raise UserError("nvdisasm was not found: pip install triton, or nvidia-cuda-nvdisasm, or put it in PATH")
    return str(found)


def _resources(report: str):
    """(mangled name, resources) of each kernel in ptxas' words."""
    blocks = re.split(r"Compiling entry function '", report)[1:]
    for block in blocks:
        mangled = block.split("'", 1)[0]
        numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        stack, stores, loads = _numbers(numbers, block)
        shared = re.search(r"(\d+) bytes smem", block)
        yield (
            mangled,
            {
                "registers": _numbers(r"Used (\d+) registers", block)[0],
                "shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": stack,
                "spill_bytes": stores + loads,
            },
        )


def _attributes(text: str, mangled: str) -> dict:
    """Parameters and the bound of the block's threads, from the section of a kernel's attributes."""
    section = text.split(f"\t.section\t.nv.info.{mangled},", 1)[1].split("\n//------------", 1)[0]
    parameters, max_threads = {}, 0
    for attribute in section.split("//----- nvinfo : ")[1:]:
        words = [int(number, 16) for number in re.findall(r"\.word\s+(0x\w+)", attribute)]
        if attribute.startswith("EIATTR_KPARAM_INFO"):
            ordinal, offset = (int(number, 16) for number in re.findall(r"\.short\s+(0x\w+)\n", attribute)[-2:])
            last = [int(number, 16) for number in re.findall(r"\.byte\s+(.*)", attribute)[-1].split(",")]
            parameters[ordinal] = offset, int.from_bytes(bytes(last), "little") >> 18
        elif attribute.startswith("EIATTR_MAX_THREADS"):
            max_threads = words[-3] * words[-2] * words[-1]
    return {"max_threads": max_threads, "parameters": tuple(parameters[i] for i in sorted(parameters))}


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """Short names: forward_kernel<BFloat16, 4>."""
    lines = _output(_tool("c++filt"), *names).splitlines()
    found = {}
    for mangled, line in zip(names, lines, strict=True):
        name = line.replace("(anonymous namespace)::", "").replace("sendvae::", "")
        short = re.search(r"^(?:void )?(\w+(?:<.*>)?)\(", name)
        found[mangled] = short[1] if short else name
    return found


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    return (lines or text.strip().splitlines() or ["no message"])[0]


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(number) for number in found.groups()] if found else [0] * pattern.count("(")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{command[0]}: {_first_error(result.stderr)}")
    return result.stdout
