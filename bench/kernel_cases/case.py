"""The form of a benchmark case."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Work = Callable[..., Any]
"""Takes an input set, returns a tensor or a tuple of tensors."""


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One op at one shape.

    All forms of the work take the same input set and return the same tensors: those that a training run uses (a wrapper
    drops the others), so that none computes what nobody reads. Gradients are taken of the outputs that require one,
    with respect to the tensors of the input set that require one; the tensors must be leaves, views are made inside the
    forms. A form may work in place on its inputs, if running it again and again on them is harmless.
    """

    name: str
    """The shape, in the words of the runs it is from: "f16d32 256px, batch 64, bf16"."""
    inputs: Callable[[int], tuple[Any, ...]]
    """Makes the input set of a number, on the device: random values, the same for the same number."""
    eager: Work
    """What plain PyTorch runs: the straightforward code that a user would write, not one made slow by casts."""
    fused: Work
    """The op's public function; the harness forces one backend after the other around it."""
    forward_bytes: int
    """The least bytes to move forward: each input read once, each output written once."""
    backward_bytes: int | None = None
    """The least bytes of the backward pass alone, upstream gradients and saved inputs included; None: no backward."""
    compiles: bool = True
    """Whether torch.compile is a yardstick (not where eager is Pillow, say)."""
    to_compile: Work | None = None
    """What torch.compile compiles, if not the eager form; what it returns is then not checked."""
    nchw: bool = False
    """Whether the eager form is timed as well on contiguous copies of its channels-last inputs."""
    yardsticks: Mapping[str, Work] = field(default_factory=dict)
    """Further forms to compare with, by name ("fused AdamW + foreach EMA + clip"); what they return is not checked."""
    tolerance: float = 2e-2
    """Largest |fused - eager| / |eager| (2-norms, each output) for the timing to count. Exactness is the tests' job."""


def random_normal(
    *shape: int, number: int, dtype: torch.dtype, device: torch.device, requires_grad: bool = False
) -> torch.Tensor:
    """Standard normal numbers, the same for the same number, shape and device; on the meta device, none."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=requires_grad)
    generator = torch.Generator(device).manual_seed(number)
    return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(requires_grad)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as case names write it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "uint8"}[dtype]
