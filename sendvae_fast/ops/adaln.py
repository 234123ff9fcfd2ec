"""Gated residual branch, norm and modulation: all that lies between two layers of a SiT block, in one pass.

B batch, N tokens, D width.
"""

import torch
import torch.nn.functional as F

from sendvae_fast.ops.dispatch import backend_for
from sendvae_fast.ops.registration import register


def adaln(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive layer norm or RMSNorm of the residual stream, with the gated branch that is still to be added to it.

        s = x + gate * branch, or x itself without a branch
        y = (s - mean(s)) / sqrt(var(s) + eps) * (1 + scale) + shift

    This is adaLN-Zero of DiT and SiT, cut so that one op does all that stands between two matrix products: the next
    layer reads y, the next `adaln` takes s as its x. Mean and (biased) variance are over D; with `rms` the mean counts
    as 0, which is RMSNorm (Zhang and Sennrich, 2019) as LightningDiT has it. s is rounded to the dtype of x, and y is
    the norm of s as rounded. Arithmetic and statistics are float32 (float64 for float64 inputs),
    whatever the inputs' dtype or autocast.

    Gradients reach x, branch, gate, shift and scale, once (no double backward; the reference has it). With g the
    gradient of y times (1 + scale) and h = (s - mean) / std: grad_s += (g - mean(g) - h mean(g h)) / std, with
    `rms` without mean(g); x gets
    grad_s, branch grad_s * gate; gate, shift and scale the sums over N of grad_s * branch, grad_y and grad_y * h, in
    float32 and in a fixed order. Kept for the backward pass: s, branch, gate, scale, and two float32 numbers per token.

    Memory traffic of the compiled and Triton backends, with e the bytes of an element of x: 4 e B N D forward (2 e
    without a branch); 6 e B N D backward (3 e without a branch), and 24 B N D / c for the sums over N, which are made
    over chunks of c = 16 or 32 tokens (CUDA: 4 to 128, by the sizes) and then over the chunks. Tokens and
    modulation are read in place when their stride along D is 1, else they are copied first. On CUDA tokens wider than
    4096 are read several times, and those that are not 16-byte aligned element by element.

    Args:
        x: [B, N, D], float32, bfloat16, float16 or float64 (reference only); B and N may be 0.
        shift: [B, D], dtype of x or float32; may be a row of a wider tensor, as from `modulation.chunk(6, dim=1)`.
        scale: like shift, same dtype.
        branch: like x, output of the layer whose residual connection this is; with `gate` or not at all.
        gate: like shift, same dtype.
        eps: added to the variance, not negative.
        rms: RMSNorm in place of layer norm. Its weight, where there is one, is a factor of 1 + scale.

    Returns:
        (y, s), both [B, N, D] in the dtype of x; contiguous, but for s where it is x.

    Raises:
        ValueError: a wrong shape, dtype or device, D of 0, only one of branch and gate, a negative eps.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    _check(x, shift, scale, branch, gate, eps)
    backend = backend_for("adaln", x)
    if backend == "reference":
        return adaln_reference(x, shift, scale, branch=branch, gate=gate, eps=eps, rms=rms)
    if branch is None:
        (y,) = _op.with_gradient(backend, 1, x, None, None, shift, scale, eps, rms)
        return y, x
    y, s = _op.with_gradient(backend, 2, x, branch, gate, shift, scale, eps, rms)
    return y, s


def adaln_reference(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`adaln` in plain, differentiable PyTorch; float64 inputs are computed in float64 throughout."""
    compute = torch.promote_types(x.dtype, torch.float32)
    shift, scale = (row.to(compute).unsqueeze(1) for row in (shift, scale))  # [B, 1, D]
    s = x
    if branch is not None:
        assert gate is not None, "branch and gate come together"
        s = (x.to(compute) + gate.to(compute).unsqueeze(1) * branch.to(compute)).to(x.dtype).contiguous()
    norm = F.rms_norm if rms else F.layer_norm
    normalised = norm(s.to(compute), s.shape[-1:], eps=eps)
    return (normalised * (1.0 + scale) + shift).to(x.dtype).contiguous(), s


def _check(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
) -> None:
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(f"x must be [B, N, D] with D > 0, got {list(shape)}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {dtype}")
    modulation = shift.dtype
    if modulation not in (dtype, torch.float32):
        raise ValueError(f"shift must be {dtype} like x, or float32, got {modulation}")
    if (branch is None) != (gate is None):
        raise ValueError("branch and gate go together: give both or neither")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    row = (shape[0], shape[2])
    expected = [("shift", shift, row, modulation), ("scale", scale, row, modulation)]
    if branch is not None:
        expected += [("branch", branch, shape, dtype), ("gate", gate, row, modulation)]
    for name, tensor, its_shape, its_dtype in expected:
        if tensor.shape != its_shape or tensor.dtype != its_dtype:
            raise ValueError(
                f"{name} must be {its_dtype} {list(its_shape)} for x {list(shape)} and shift {modulation}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}: put all on one device")


def _packed_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(x, branch, gate, shift, scale, eps, rms):
    s = x.new_empty(0) if branch is None else _packed_like(x)
    return _packed_like(x), s, x.new_empty((*x.shape[:2], 2), dtype=torch.float32)


def _fake_backward(grad_y, grad_s, s, branch, gate, scale, stats, rms):
    if branch is None:
        grad_branch, grad_gate = s.new_empty(0), scale.new_empty(0)
    else:
        grad_branch, grad_gate = _packed_like(s), _packed_like(gate)
    return _packed_like(s), grad_branch, grad_gate, _packed_like(scale), _packed_like(scale)


def _setup_context(ctx, inputs, output):
    x, branch, gate, _, scale, _, ctx.rms = inputs
    _, s, stats = output
    ctx.save_for_backward(x if branch is None else s, branch, gate, scale, stats)
    # s of a network's last norm is used nowhere: no pass over zeros for it.
    ctx.set_materialize_grads(False)


def _backward(op, ctx, grad_y, grad_s, _grad_stats):
    s, branch, gate, scale, stats = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(s)
    if branch is None:
        grad_s = None  # the op's s is an empty stand-in; autograd itself adds what arrives at x
    grad_x, grad_branch, grad_gate, grad_shift, grad_scale = op(grad_y, grad_s, s, branch, gate, scale, stats, ctx.rms)
    if branch is None:
        grad_branch = grad_gate = None
    return grad_x, grad_branch, grad_gate, grad_shift, grad_scale, None, None


_op = register(
    "adaln",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    without_gradient=lambda inputs, output: output[-1:],
)
