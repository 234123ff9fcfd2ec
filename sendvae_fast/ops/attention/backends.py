"""The backends of attention: the call of each, and the reasons why it cannot run.

    sdpa        PyTorch's `scaled_dot_product_attention`, by its own choice among the four that follow
    cudnn, flash, efficient, math
                one of them: cuDNN's, PyTorch's flash attention 2, memory-efficient attention, plain matrix products
    flash2      the package flash-attn
    flash3      its sibling for Hopper, module `flash_attn_interface`
    flash4      its successor for Hopper and Blackwell, the package flash-attn-4, module `flash_attn.cute`
    xformers    the package xformers

The limits written here are those known beforehand; what else a kernel refuses shows when it is measured
(`tuning`). Packages are imported only when a CUDA device that they could run on asks for them, and are available there
if a small call computes what it should: some can be imported beside a PyTorch or a CUDA that their kernels do not fit.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sendvae_fast.ops.tracing import constant_when_traced

HALF = (torch.float16, torch.bfloat16)

_modules: dict[str, ModuleType] = {}  # imported so far


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention. The limits are those of CUDA; on a CPU there are none."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    """q, k, v [B, heads, N, head_dim] to the same."""
    module: str | None = None
    """Module of an optional package."""
    install: str = ""
    """How that package is installed."""
    on_cpu: bool = False
    """Whether it takes CPU tensors."""
    dtypes: tuple[torch.dtype, ...] = HALF
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    capabilities: tuple[int, ...] | None = None
    """Major compute capabilities it has kernels for; None: any."""


def unavailable(name: str, device_type: str, device_index: int | None) -> str | None:
    """Why a backend takes no tensors of this device, or None."""
    backend = BACKENDS[name]
    if device_type != "cuda":
        return None if device_type == "cpu" and backend.on_cpu else f"it takes no {device_type} tensors"
    if backend.capabilities is not None:
        major, minor = torch.cuda.get_device_capability(device_index)
        if major not in backend.capabilities:
            return f"it has no kernels for compute capability {major}.{minor}"
    if backend.module is None:
        return None
    reason = import_module(backend.module) or failure(name, device_type, device_index)
    return reason and f"{reason}; to install it: {backend.install}"


@cache
def failure(name: str, device_type: str, device_index: int | None) -> str | None:
    """What goes wrong when a backend attends to ones on a device, whose mean is 1; None if nothing does.

    Raises:
        torch.OutOfMemoryError: the device has no memory left even for that.
    """
    device = torch.device(device_type, device_index)  # pyright: ignore[reportArgumentType] - None is taken
    try:
        with torch.no_grad():
            ones = torch.ones(1, 1, 16, 64, dtype=torch.float16, device=device)
            out = BACKENDS[name].run(ones, ones, ones)
            return None if bool((out == 1).all()) else "it is installed, but attends to ones with a result other than 1"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever kind a foreign kernel raises
        said = next(iter(str(error).splitlines()), "")
        return f"it is installed, but a small call fails ({type(error).__name__}: {said})"


def unsupported(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend that takes the device's tensors takes none of this dtype and head dim, or None."""
    backend = BACKENDS[name]
    if device_type == "cpu":
        return None
    if dtype not in backend.dtypes:
        return f"it takes no {dtype}"
    if backend.max_head_dim is not None and head_dim > backend.max_head_dim:
        return f"its head dim is at most {backend.max_head_dim}"
    if head_dim % backend.head_dim_multiple != 0:
        return f"its head dim must be a multiple of {backend.head_dim_multiple}"
    return None


def _sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.numel() == 0:  # some versions have no fused kernel for nothing
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel([kernel]):
        return F.scaled_dot_product_attention(_packed(q), _packed(k), _packed(v))


def _package(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The packages want [B, N, heads, head_dim], and something to do."""
    if q.numel() == 0:
        return F.scaled_dot_product_attention(q, k, v)
    return function(*(_packed(x).transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is not packed, as all the kernels but the plain ones demand."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _module("flash_attn").flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = _module("flash_attn_interface").flash_attn_func(q, k, v, deterministic=deterministic)
    return out[0] if isinstance(out, tuple) else out  # older versions give (out, log-sum-exp)


def _flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _module("flash_attn.cute").flash_attn_func(q, k, v, deterministic=deterministic)[0]  # and log-sum-exp


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _module("xformers.ops").memory_efficient_attention(q, k, v)


def _module(name: str) -> ModuleType:
    _ensure_imported(name)
    return _modules[name]


# Dynamo calls this while tracing, where an import statement would not be followed.
@constant_when_traced
def _ensure_imported(name: str) -> bool:
    return import_module(name) is None


@cache
def import_module(name: str) -> str | None:
    """None if the module can be used, else the reason: packages built for another PyTorch fail in many ways."""
    try:
        _modules[name] = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except Exception as error:
        return f"does not load: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


_PLAIN = (torch.float64, torch.float32, *HALF)
BACKENDS = {
    "sdpa": AttentionBackend(F.scaled_dot_product_attention, on_cpu=True, dtypes=_PLAIN),
    "cudnn": AttentionBackend(partial(_sdpa, SDPBackend.CUDNN_ATTENTION), capabilities=(8, 9, 10, 11, 12)),
    "flash": AttentionBackend(
        partial(_sdpa, SDPBackend.FLASH_ATTENTION), on_cpu=True, max_head_dim=256, capabilities=(8, 9, 10, 11, 12)
    ),
    "efficient": AttentionBackend(partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION), dtypes=(torch.float32, *HALF)),
    "math": AttentionBackend(partial(_sdpa, SDPBackend.MATH), on_cpu=True, dtypes=_PLAIN),
    "flash2": AttentionBackend(
        partial(_package, _flash2), "flash_attn",
        "pip install --no-build-isolation flash-attn, beside the nvcc of PyTorch's CUDA",
        max_head_dim=256, capabilities=(8, 9, 10, 11, 12),
    ),
    "flash3": AttentionBackend(
        partial(_package, _flash3), "flash_attn_interface",
        "build the folder hopper of github.com/Dao-AILab/flash-attention; it is not on PyPI",
        max_head_dim=256, head_dim_multiple=8, capabilities=(9,),
    ),
    "flash4": AttentionBackend(
        partial(_package, _flash4), "flash_attn.cute",
        "pip install --pre 'flash-attn-4[cu13]', without [cu13] for CUDA 12",
        max_head_dim=256, head_dim_multiple=8, capabilities=(9, 10, 11, 12),
    ),
    "xformers": AttentionBackend(
        partial(_package, _xformers), "xformers.ops",
        "pip install xformers beside PyTorch for CUDA 12, which PyPI's wheels are built for; for CUDA 13 build it: "
        "pip install --no-build-isolation --no-binary xformers xformers",
        dtypes=(torch.float32, *HALF),
    ),
}  # fmt: skip
