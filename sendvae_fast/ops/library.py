"""The compiled parts: the op libraries behind `torch.ops.sendvae` and the pybind11 module `_host`.

`setup.py` puts them into `sendvae_fast/_lib`. All are optional: without them the ops run on Triton or plain PyTorch,
and `status` says why.

`SENDVAE_OPS_LIBRARY=<file>` is loaded in place of the CPU library. It is for tests: tests/cuda_on_cpu loads the schemas
alone, and then CUDA kernels built for the CPU, which run as the backend `cpu`.
"""

import hashlib
import importlib
import os
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.compiler.config

from sendvae_fast.version import __version__

LIBRARY_DIR = Path(__file__).resolve().parent.parent / "_lib"
CPU_LIBRARY = "libsendvae_ops.so"
CUDA_LIBRARY = "libsendvae_ops_cuda.so"
HOST_MODULE = "sendvae_fast._lib._host"
NOT_BUILT_FILE = "not_built.txt"
"""Beside the libraries, or in their place: why they could not be built (written by setup.py)."""
ENVIRONMENT_VARIABLE = "SENDVAE_OPS_LIBRARY"
SCHEMAS = Path("csrc", "library.cpp")
"""From the checkout on: every schema of the compiled ops."""
REBUILD = "pip install -v . in a checkout builds it, or shows why not"


def load() -> bool:
    """Load the op libraries, once; True if the CPU library is there, so that `torch.ops.sendvae` has its schemas.

    The CUDA library is loaded only where PyTorch sees a CUDA device.
    """
    return status()["cpu"] is None


def status() -> dict[str, str | None]:
    """For each of "cpu", "cuda" and "host": None if it is loaded, else the reason why not, in one line."""
    cpu, cuda = _load_all_ops()
    return {"cpu": cpu, "cuda": cuda, "host": _import_host()[1]}


@cache
def stale() -> str | None:
    """That the CPU library was built from other sources than those beside it and must be built again, or None.

    A schema is a C string in the library, so it is looked for there. Only a checkout has sources to compare with.
    """
    checkout, path = LIBRARY_DIR.parent.parent, LIBRARY_DIR / CPU_LIBRARY
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return None
    try:
        sources, built = (checkout / SCHEMAS).read_text(encoding="utf-8"), path.read_bytes()
    except OSError:
        return None
    for schema in schemas(sources):
        if schema.encode() + b"\0" not in built:
            return (
                f"{path} was built from other sources than {checkout / SCHEMAS}, where {schema.partition('(')[0]} is "
                f"another: build it again with `pip install -v --no-build-isolation --no-deps -e {checkout}`"
            )
    return None


def schemas(sources: str) -> list[str]:
    """The schemas in the text of csrc/library.cpp."""
    calls = re.findall(r'library\.def\(\s*((?:"[^"]*"\s*)+)\)', sources)
    return ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]


def host() -> ModuleType | None:
    """The module `_host` (build facts, the reader of latent shards), or None if it is not built."""
    return _import_host()[0]


@cache  # the ops ask at every call
def _load_all_ops() -> tuple[str | None, str | None]:
    # The schemas are in the CPU library, so it comes first and the CUDA library needs it.
    path = Path(os.environ.get(ENVIRONMENT_VARIABLE) or LIBRARY_DIR / CPU_LIBRARY)
    cpu = stale() or _load_ops(path)
    _set_compiled_graphs_apart(path if cpu is None else None)
    return cpu, _missing_cuda(cpu) or _load_ops(LIBRARY_DIR / CUDA_LIBRARY)


def _missing_cuda(cpu: str | None) -> str | None:
    """The reason not to try loading the CUDA library, or None."""
    if not (LIBRARY_DIR / CUDA_LIBRARY).is_file():
        module = host()
        if module is None:
            return _not_built()
        reason = module.build_info()["cuda_reason"]
        return f"built without CUDA: {reason or 'the library is missing'}"
    if cpu is not None:
        return "it needs the CPU library"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


def _load_ops(path: Path) -> str | None:
    """Load one op library; None, or the reason why that failed."""
    if not path.is_file():
        return _not_built()
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load under torch {torch.__version__}: {_first_line(error)}"
    return None


def _set_compiled_graphs_apart(library: Path | None) -> None:
    """Have torch.compile take no graph from the disk that it compiled with another build of the ops.

    A compiled graph expects of an op the outputs that it had, and fails at others; the key by which PyTorch finds it
    has the op's name alone.
    """
    build = "" if library is None else f" {hashlib.sha256(library.read_bytes()).hexdigest()[:16]}"
    config = torch.compiler.config
    config.cache_key_tag = f"{config.cache_key_tag} sendvae_fast {__version__}{build}".strip()


@cache
def _import_host() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(HOST_MODULE), None
    except ModuleNotFoundError:
        return None, _not_built(" for this Python")
    except ImportError as error:
        return None, f"does not load: {_first_line(error)}"


def _not_built(for_what: str = "") -> str:
    """That something was not built, and why or what to do, in one line."""
    try:
        why = (LIBRARY_DIR / NOT_BUILT_FILE).read_text(encoding="utf-8").strip().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        why = ""
    return f"not built{for_what}: {why}" if why else f"not built{for_what}; {REBUILD}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
