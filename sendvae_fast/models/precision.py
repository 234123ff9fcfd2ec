"""bfloat16 without round trips through float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def cast_parameters(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a frozen network, which then computes in `dtype` without autocast.

    Autocast would cast weights that take no gradient at every call, and take each LayerNorm to float32 and back; the
    kernels of PyTorch's norms sum in float32 in any case. Buffers (frequencies of rotary embeddings) stay as they are,
    and so do batch norms, which take inputs of another dtype than their own.
    """
    for module in network.modules():
        if not isinstance(module, _BatchNorm):
            for param in module.parameters(recurse=False):
                param.data = param.data.to(dtype)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Let operations on `x` keep its dtype: autocast takes norms and nearest-neighbour resizing to float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def computes_bf16() -> bool:
    """Whether this machine multiplies in bfloat16. A CPU that emulates it takes four times as long as in float32."""
    if torch.cuda.is_available():
        return True
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in every torch
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
