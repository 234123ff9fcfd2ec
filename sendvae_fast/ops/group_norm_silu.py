"""GroupNorm and SiLU of channels-last feature maps in one op, with the residual sum before them where there is one.

B batch, C channels, H W height and width, G groups.
"""

import torch

from sendvae_fast.ops.dispatch import COMPILED, backend_for
from sendvae_fast.ops.registration import register


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Group normalisation (Wu and He, 2018) with an affine map, then SiLU; optionally of a sum, which is returned too.

        s = x + residual                                     or x itself
        z = (s - mean) / sqrt(variance + eps) weight + bias  mean, variance over C / G channels, H and W
        y = z sigmoid(z)                                     or z itself

    Statistics and arithmetic are float32 (float64 for float64 inputs), and a large mean costs no accuracy. Outputs have
    x's dtype, under autocast too (which on a GPU would take torch's own group_norm to float32). s is rounded to x's
    dtype before it is normalised.

    Outputs and gradients of maps are channels-last, whatever the layout of the inputs; another layout is converted
    first, which costs a copy. Gradients reach x, residual, weight and bias, once (no double backward; the reference
    has it). Besides what was normalised (x, or s) the backward pass keeps mean and rstd, 2 B G float32 numbers.

    Memory traffic of the compiled and Triton backends in maps (B C H W elements): 3 forward, 5 backward; with a
    residual 5 and 6. Partial sums add a few percent. On CUDA what is read again of a small map (up to about 32 x 32 in
    16 bits, 16 x 16 in float32, where groups are narrow) comes from a cache: 2 and 3, with a residual 4 and 4. Numbers
    below 2^-126 may count as 0 there.

    Args:
        x: [B, C, H, W], float32, bfloat16, float16 or float64 (reference only); B may be 0.
        weight: [C], float32 or x's dtype.
        bias: like weight.
        num_groups: G, a divisor of C.
        eps: added to the variance, positive.
        residual: like x, or None.
        silu: False leaves out the activation.

    Returns:
        y [B, C, H, W] in x's dtype; with a residual (y, s).

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, a C that num_groups does not divide, an eps that is not
            positive.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    backend = backend_for("group_norm_silu", x)
    floats = weight.dtype is torch.float32 and bias.dtype is torch.float32
    # The compiled ops check the rest. To do so here, too, would take a tenth of the time of a call on a small map.
    if backend not in COMPILED or not floats or not eps > 0:
        _check(x, weight, bias, num_groups, eps, residual)
    if backend == "reference":
        return group_norm_silu_reference(x, weight, bias, num_groups, eps, residual=residual, silu=silu)
    if not floats:
        weight, bias = weight.float(), bias.float()
    try:
        if residual is None:
            return _op.with_gradient(backend, 1, x, None, weight, bias, num_groups, eps, silu)[0]
        y, s = _op.with_gradient(backend, 2, x, residual, weight, bias, num_groups, eps, silu)
        return y, s
    except RuntimeError:
        _check(x, weight, bias, num_groups, eps, residual)  # says what the op refused, in this page's words
        raise


def group_norm_silu_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`group_norm_silu` in plain, differentiable PyTorch; float64 inputs are computed in float64 throughout."""
    s = x if residual is None else x + residual
    compute = torch.promote_types(x.dtype, torch.float32)
    # Not F.group_norm, which refuses groups of a single element.
    z = torch.group_norm(s.to(compute), num_groups, weight.to(compute), bias.to(compute), eps)
    y = torch.nn.functional.silu(z) if silu else z
    y, s = (out.to(x.dtype).contiguous(memory_format=torch.channels_last) for out in (y, s))
    return y if residual is None else (y, s)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    eps: float,
    residual: torch.Tensor | None,
) -> None:
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) != 4 or (0 in shape and 0 in shape[1:]):
        raise ValueError(f"x must be [B, C, H, W] with C, H and W > 0, got {list(shape)}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {dtype}")
    channels = shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (channels,):
            raise ValueError(f"{name} must be [{channels}] like the channels of x, got {list(tensor.shape)}")
        if tensor.dtype not in (torch.float32, dtype):
            raise ValueError(f"{name} must be float32 or {dtype} like x, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}: put both on one device")
    if residual is not None:
        if residual.shape != shape or residual.dtype != dtype:
            raise ValueError(
                f"residual must be {list(shape)} and {dtype} like x, got {list(residual.shape)} and {residual.dtype}"
            )
        if residual.device != device:
            raise ValueError(f"residual is on {residual.device}, x on {device}: put both on one device")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def _fake(x, residual, weight, bias, num_groups, eps, silu):
    _check(x, weight, bias, num_groups, eps, residual)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    s = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, s, x.new_empty((2, x.shape[0], num_groups), dtype=torch.float32)


def _fake_backward(grad_y, grad_s, s, stats, weight, bias, num_groups, silu):
    grad_x = torch.empty_like(s, memory_format=torch.channels_last)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, ctx.num_groups, _, ctx.silu = inputs
    _, s, stats = output
    ctx.save_for_backward(x if residual is None else s, stats, weight, bias)
    ctx.set_materialize_grads(False)  # s is often not used again


def _without_gradient(inputs, output):
    _, s, stats = output
    return (stats, s) if inputs[1] is None else (stats,)


def _backward(op, ctx, grad_y, grad_s, _grad_stats):
    if grad_y is None:
        return grad_s, grad_s, None, None, None, None, None
    grad_x, grad_weight, grad_bias = op(grad_y, grad_s, *ctx.saved_tensors, ctx.num_groups, ctx.silu)
    return grad_x, grad_x if ctx.needs_input_grad[1] else None, grad_weight, grad_bias, None, None, None


_op = register(
    "group_norm_silu",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    without_gradient=_without_gradient,
)
