"""Weight files: reading without running code in them, and loading into a module, with errors that say why not."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sendvae_fast import checks
from sendvae_fast.engine.snapshot import find_unsound
from sendvae_fast.errors import UserError

BROKEN = (
    SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, TypeError,
    LookupError, AttributeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip
"""What safetensors and torch.load(weights_only=True) raise for a file that is not one of theirs."""
_NAMED_KEYS = 3  # keys of each kind that an error message spells out


def read_weights(path: str | Path) -> dict:
    """The content of a ``.safetensors`` file, or of another one through ``torch.load(weights_only=True)``, on the CPU.

    Usually a state dict; published ``.pth`` files may wrap theirs in another dict. `UserError` where the file is
    missing, broken, or would need to run code.
    """
    path = Path(path)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"weight file {path} {wrong}: give the path of a .safetensors or .pth file")
    if not checks.is_utf8(path):
        raise UserError(f"the path of the weights {path} is not UTF-8, and safetensors reads no such file: rename it")
    if _is_torchscript(path):
        raise UserError(
            f"weight file {path} is a TorchScript archive, a program that is not run here: give the same weights as "
            ".safetensors, or save torch.jit.load(path).state_dict() with torch.save where you trust the file"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except (*BROKEN, OSError) as error:
        raise UserError(
            f"weight file {path} is broken or holds more than tensors: fetch it again, or convert it to .safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"weight file {path} holds a {type(content).__name__}, not named tensors: save a state dict")
    if any(not _is_plain(tensor) for tensor in _tensors(content)):
        raise UserError(f"weight file {path} holds sparse, quantised, complex or empty tensors: save plain ones")
    return content


ModuleType = TypeVar("ModuleType", bound=nn.Module)


def build_to_fit(build: Callable[[], ModuleType], state: dict[str, Tensor], source: str | Path) -> ModuleType:
    """The module that `build` makes, with the weights `state`; see `load_weights`.

    It is made without memory first, so that sizes which are not those of the weights cost none.
    """
    with torch.device("meta"):
        check_fit(build(), state, source)
    module = build()
    load_weights(module, state, source)
    return module


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module`; every key and shape must match, every element must be finite.

    Raises `UserError` in one line that names `source` and the first few missing, unexpected and mis-shaped keys, or
    those with NaN, inf or a number beyond 2^63. The module's own weights are as they were then.
    """
    check_fit(module, state, source)
    broken = find_unsound(state.items())
    if broken:
        what = "NaN or inf" if any(not state[key].isfinite().all() for key, _ in broken) else "exploded numbers"
        keys = _first([key for key, _ in broken])
        raise UserError(f"{source} has {what} in {len(broken)} weights ({keys}): fetch it again")
    module.load_state_dict(state)


def check_fit(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Raise the `UserError` of `load_weights` unless `state` is one for `module`."""
    own = module.state_dict()
    shapes = [
        f"{key} {_shape(state[key])} instead of {_shape(value)}"
        for key, value in own.items()
        if key in state and value.shape != getattr(state[key], "shape", None)
    ]
    missing, unexpected = ([key for key in one if key not in other] for one, other in ((own, state), (state, own)))
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    found = [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in problems if keys]
    if found:
        raise UserError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(found)}. Use the configuration that these "
            "weights were made with"
        )


def part_of_checkpoint(content: dict, first_weight: str, wrappers: tuple[str, ...]) -> dict[str, Tensor]:
    """The state dict in a training checkpoint that has `first_weight`, without the prefix of its names.

    Looked for in `content` and then in its entries `wrappers`. Raw weights are taken before averaged ones (a prefix
    with ``ema``), as REPA-E does. Empty where there is none.
    """
    for state in (content, *(content.get(name) for name in wrappers)):
        if not isinstance(state, dict):
            continue
        keys = [key for key in state if isinstance(key, str)]
        prefixes = [key.removesuffix(first_weight) for key in keys if f".{key}".endswith(f".{first_weight}")]
        if prefixes:
            prefix = min(prefixes, key=lambda name: ("ema" in name, len(name)))
            return {key.removeprefix(prefix): state[key] for key in keys if key.startswith(prefix)}
    return {}


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of a state dict's names, dtypes, shapes and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _torch_load(path: Path):
    # The settings in checkpoints of SiT, REPA and REPA-E are argparse's: an object that only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (*BROKEN, OSError):  # no archive, or a damaged one
        return False


def _tensors(content: object) -> Iterator[Tensor]:
    """The tensors in nested dicts and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors(value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has real values in memory, one by one: PyTorch copies complex ones without their other half."""
    has_values = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return has_values and not tensor.is_quantized and not tensor.is_complex()


def _shape(tensor) -> str:
    return "x".join(map(str, getattr(tensor, "shape", ()))) or "scalar"


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_NAMED_KEYS]) + (", ..." if len(keys) > _NAMED_KEYS else "")
