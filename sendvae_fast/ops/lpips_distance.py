"""A layer's term of LPIPS, without materialising normalised features.

B batch, C channels, H W height and width of a feature map.
"""

import torch

from sendvae_fast.ops.dispatch import backend_for
from sendvae_fast.ops.layout import common_memory_format
from sendvae_fast.ops.registration import register

EPS = 1e-10
"""Added to every norm, as the lpips package does."""


def lpips_distance(f0: torch.Tensor, f1: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted squared distance of unit-normalised features, averaged over the pixels.

        u0 = f0 / (|f0| + 1e-10),  u1 = f1 / (|f1| + 1e-10)        norms over the channels of a pixel
        distance = mean over pixels of sum over channels of weight (u0 - u1)²

    This is a layer's term in Eq. 1 of Zhang et al., "The unreasonable effectiveness of deep features as a perceptual
    metric" (2018), as the lpips package computes it. Sums over channels are float32 (float64 for float64 inputs),
    whatever the inputs' dtype or autocast.

    Gradients reach f0 and f1, whichever require one, once (no double backward; the reference has it), and not weight.
    Besides the inputs the backward pass keeps four float32 numbers per pixel. Where a norm is 0 it counts as a constant
    (the lpips package's own gradient is NaN there): the gradient is that of the other factor, huge but finite, and
    features that come from a ReLU do not pass it on.

    Memory traffic of the compiled and Triton backends, s the bytes of an element: 2 s B C H W forward, 3 s B C H W
    backward for each side that asks. Contiguous and channels-last features and chunks of their channels are read in
    place if both are of one kind; the gradients are channels-last if both have channels that lie side by side, else
    contiguous. There is no CUDA backend: beside the network it is a small part, which Triton does.

    Args:
        f0: [B, C, H, W], float32, bfloat16, float16 or float64 (reference only); any layout, B may be 0.
        f1: like f0. If the dtypes differ, both are first promoted to the wider one (a copy).
        weight: [C], floating point: the layer's linear head.

    Returns:
        float32 [B] (float64 for float64 inputs).

    Raises:
        ValueError: a wrong shape, dtype or device, C, H or W of 0.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    _check(f0, f1, weight)
    dtype = torch.promote_types(f0.dtype, f1.dtype)
    f0, f1 = f0.to(dtype), f1.to(dtype)
    backend = backend_for("lpips_distance", f0)
    if backend == "reference":
        return lpips_distance_reference(f0, f1, weight)
    (distance,) = _op.with_gradient(backend, 1, f0, f1, weight.detach().float())
    return distance


def lpips_distance_reference(f0: torch.Tensor, f1: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`lpips_distance` in plain, differentiable PyTorch; float64 inputs are computed in float64 throughout."""
    compute = torch.promote_types(torch.promote_types(f0.dtype, f1.dtype), torch.float32)
    f0, f1 = f0.to(compute), f1.to(compute)
    u0, u1 = (f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + EPS) for f in (f0, f1))
    return ((u0 - u1).square() * weight.detach().to(compute)[:, None, None]).sum(1).mean((1, 2))


def _check(f0: torch.Tensor, f1: torch.Tensor, weight: torch.Tensor) -> None:
    if f0.dim() != 4 or 0 in f0.shape[1:]:
        raise ValueError(f"f0 must be [B, C, H, W] with C, H, W > 0, got {list(f0.shape)}")
    if f0.shape != f1.shape:
        raise ValueError(f"f0 {list(f0.shape)} and f1 {list(f1.shape)} must have one shape")
    if tuple(weight.shape) != (f0.shape[1],):
        raise ValueError(f"weight must be [C] = [{f0.shape[1]}], got {list(weight.shape)}")
    for name, tensor in (("f0", f0), ("f1", f1), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != f0.device:
            raise ValueError(f"{name} is on {tensor.device}, f0 on {f0.device}: put all on one device")


def _fake(f0, f1, weight):
    batch, _, height, width = f0.shape
    return weight.new_empty(batch), weight.new_empty(batch, 4, height * width)


def _fake_backward(grad, f0, f1, weight, stats, need_grad0, need_grad1):
    memory_format = common_memory_format(f0, f1)
    return tuple(
        torch.empty_like(f0, memory_format=memory_format) if needed else f0.new_empty(0)
        for needed in (need_grad0, need_grad1)
    )


def _setup_context(ctx, inputs, output):
    _, stats = output
    ctx.save_for_backward(*inputs, stats)


def _backward(op, ctx, grad, _grad_stats):
    needed = ctx.needs_input_grad[:2]
    grads = op(grad, *ctx.saved_tensors, *needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None


_op = register(
    "lpips_distance",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    without_gradient=lambda inputs, output: output[-1:],
)
