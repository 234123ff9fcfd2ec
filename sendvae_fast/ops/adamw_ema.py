"""One optimizer step for many tensors: gradient clipping, AdamW and a moving average, in one pass over memory."""

from collections.abc import Sequence

import torch

from sendvae_fast.ops.dispatch import backend_for
from sendvae_fast.ops.layout import is_channels_last
from sendvae_fast.ops.registration import register

Tensors = Sequence[torch.Tensor]
SCALAR = torch.Size()
# Dtype of the parameters: those of their gradients.
GRAD_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64,),
}


@torch.no_grad()
def adamw_ema_(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    ema: Tensors | None,
    steps: Tensors,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    ema_decay: float | None = None,
    grad_norm: torch.Tensor | None = None,
    max_grad_norm: float = 0.0,
) -> None:
    """AdamW (Loshchilov & Hutter, 2019) on clipped gradients, then a moving average of the parameters, in place.

        k   <- k + 1
        g   <- grad min(1, max_grad_norm / (grad_norm + 1e-6))
        p   <- p (1 - lr weight_decay)
        m   <- m + (1 - beta1)(g - m);   v <- beta2 v + (1 - beta2) g^2
        p   <- p - lr / (1 - beta1^k)  m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
        ema <- ema + (1 - ema_decay)(p - ema)

    The order of operations is that of `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW`. With a `grad_norm` that
    is not finite nothing changes at all, steps included. Clip coefficient, that decision and the bias corrections (in
    float64) are computed on the device, so the host never waits and a CUDA graph of the call may be replayed.

    Each tensor has its own step count, since parameters may join later or be without a gradient at times: the caller
    leaves those out of the lists.

    Memory traffic of the compiled backends: 36 bytes per parameter with float32 gradients, 34 with bfloat16, 8 less
    without a moving average. Parameter and state must be contiguous, or channels-last all of them, or the reference
    takes that parameter; a gradient in another layout is copied first.

    There is no Triton backend: Triton has no array of pointers as an argument, so each tensor would take a launch of
    its own, and hundreds of small ones are what this op is there to avoid.

    Args:
        params: float32 (or all of float64: reference only) on one device, any shapes, changed in place. No two tensors
            of the call may share memory.
        grads: as large as params; all float32, bfloat16 or float16 (float64).
        exp_avg: the first moment m, like params, changed in place.
        exp_avg_sq: the second moment v, likewise.
        ema: the average, like params, changed in place; or None, together with ema_decay.
        steps: int64 scalar tensors on the same device: updates made so far; changed in place.
        lr: as in the formula, like the four that follow.
        betas: beta1 and beta2.
        eps: added to the root of the second moment.
        weight_decay: times lr, the share of itself that a parameter loses.
        ema_decay: share of the average that is kept; None with `ema` None.
        grad_norm: scalar tensor of the params' dtype: the norm of all gradients, see `global_norm`. None: no clipping,
            and the step is never skipped.
        max_grad_norm: largest norm of the gradients after clipping; 0 leaves them as they are.

    Raises:
        ValueError: lists, shapes, dtypes or devices that do not fit, ema without ema_decay or the other way round,
            max_grad_norm without grad_norm.
        UserError: the forced backend cannot run, see `dispatch`.
    """
    lists = params, grads, exp_avg, exp_avg_sq, [] if ema is None else ema, steps
    _check(*lists, ema_decay, grad_norm, max_grad_norm)
    if not params:
        return
    backend = backend_for("adamw_ema", params[0])
    settings = (grad_norm, lr, *betas, eps, weight_decay, ema_decay or 0.0, max_grad_norm)
    if backend == "reference":
        adamw_ema_reference_(*lists, *settings)
        return
    params, grads, *others = _in_memory_order(*lists)
    packed, strided = _split(params, [grad.contiguous() for grad in grads], *others)
    if packed[0]:
        _op(backend, *packed, *settings)
        if not torch.compiler.is_compiling():
            # So that autograd notices a graph that still needs the old values, as after any in-place operation.
            torch.autograd.graph.increment_version([*packed[0], *packed[4]])
    if strided[0]:
        adamw_ema_reference_(*strided, *settings)  # pyright: ignore[reportCallIssue] - six lists


def adamw_ema_reference_(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    ema: Tensors,
    steps: Tensors,
    grad_norm: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    max_grad_norm: float,
) -> None:
    """`adamw_ema_` in plain PyTorch, with the arguments of the compiled op: `ema` is empty where there is none."""
    is_finite = None if grad_norm is None else grad_norm.isfinite()
    for i, (param, m, v, step) in enumerate(zip(params, exp_avg, exp_avg_sq, steps, strict=True)):
        grad = grads[i].to(param.dtype)
        if max_grad_norm and grad_norm is not None:
            grad = grad * (max_grad_norm / (grad_norm + 1e-6)).clamp_max(1.0)
        new_step = step + 1
        correction1, correction2 = (1.0 - beta ** new_step.double() for beta in (beta1, beta2))
        new_m = m.lerp(grad, 1.0 - beta1)
        new_v = (v * beta2).addcmul(grad, grad, value=1.0 - beta2)
        denominator = new_v.sqrt() / correction2.sqrt().to(param.dtype) + eps
        new_param = param * (1.0 - lr * weight_decay) - (lr / correction1).to(param.dtype) * (new_m / denominator)
        changes = [(step, new_step), (param, new_param), (m, new_m), (v, new_v)]
        if ema:
            changes.append((ema[i], ema[i].lerp(new_param, 1.0 - ema_decay)))
        for old, new in changes:
            old.copy_(new if is_finite is None else torch.where(is_finite, new, old))


def _check(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    ema: Tensors,
    steps: Tensors,
    ema_decay: float | None,
    grad_norm: torch.Tensor | None,
    max_grad_norm: float,
) -> None:
    if max_grad_norm and grad_norm is None:
        raise ValueError(f"max_grad_norm {max_grad_norm} needs grad_norm")
    num_ema = 0 if ema_decay is None else len(params)
    lists = {"grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema, "steps": steps}
    for name, tensors in lists.items():
        if len(tensors) != (wanted := num_ema if name == "ema" else len(params)):
            raise ValueError(f"{name} must have {wanted} tensors for {len(params)} params, got {len(tensors)}")
    if not params:
        return
    dtype, grad_dtype, device = params[0].dtype, grads[0].dtype, params[0].device
    if dtype not in GRAD_DTYPES:
        raise ValueError(f"params must be float32 or float64, got {dtype}")
    if grad_dtype not in GRAD_DTYPES[dtype]:
        allowed = " or ".join(map(str, GRAD_DTYPES[dtype]))
        raise ValueError(f"grads of {dtype} params must be {allowed}, got {grad_dtype}")
    shapes = [param.shape for param in params]
    _check_list("params", params, shapes, dtype, device)
    _check_list("grads", grads, shapes, grad_dtype, device)
    for name in ("exp_avg", "exp_avg_sq", "ema"):
        _check_list(name, lists[name], shapes[: len(lists[name])], dtype, device)
    _check_list("steps", steps, [SCALAR] * len(steps), torch.int64, device)
    if grad_norm is not None:
        _check_list("grad_norm", [grad_norm], [SCALAR], dtype, device)


def _check_list(
    name: str, tensors: Tensors, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> None:
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {device} here, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )


def _in_memory_order(params: Tensors, *lists: Tensors) -> list[list[torch.Tensor]]:
    """The lists with channels-last parameters, and all that belongs to them, as views [B, H, W, C]."""
    turned = {i for i, param in enumerate(params) if is_channels_last(param)}
    return [
        [x.permute(0, 2, 3, 1) if i in turned and x.dim() == 4 else x for i, x in enumerate(tensors)]
        for tensors in (params, *lists)
    ]


def _split(*lists: Tensors) -> tuple[Sequence[Tensors], Sequence[Tensors]]:
    """The lists at the places where every tensor is contiguous, and at the other places."""
    strided = {i for tensors in lists for i, x in enumerate(tensors) if not x.is_contiguous()}
    if not strided:
        return lists, [[] for _ in lists]
    packed_lists, strided_lists = (
        [[x for i, x in enumerate(tensors) if (i in strided) == wanted] for tensors in lists]
        for wanted in (False, True)
    )
    return packed_lists, strided_lists


def _fake(*arguments):
    return None


_op = register("adamw_ema", fake=_fake)
