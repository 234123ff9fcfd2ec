"""Measuring the backends of `attention` on this machine, for the table that it picks from."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sendvae_fast.ops.attention.backends import BACKENDS, unavailable, unsupported
from sendvae_fast.ops.attention.call import attention_reference
from sendvae_fast.ops.attention.table import AttentionShape, Measurement, save

NUM_ROUNDS = 15
CHECKED_SAMPLES = 2  # of the batch: the truth needs the N x N matrix


def model_shapes(dtype: torch.dtype) -> list[AttentionShape]:
    """The shapes of the paper's networks at 256 pixels: mapper and SiT (B, L, XL), and the f16 and f8 autoencoders."""
    transformers = [(heads, 256, head_dim) for heads, head_dim in ((12, 64), (16, 64), (16, 72))]
    autoencoders = [(1, tokens, 512) for tokens in (256, 1024)]
    return [
        AttentionShape(batch, *sizes, dtype, training)
        for group, batches in ((transformers, (32, 64, 128, 256)), (autoencoders, (16, 32, 64)))
        for sizes in group for batch in batches for training in (False, True)
    ]  # fmt: skip


def tune_attention(shapes: Iterable[AttentionShape], device: torch.device | str = "cuda") -> list[Measurement]:
    """Time every backend at each shape, and keep the results in this device's table, see `table`: each as it comes.

    A backend that fails, or whose result is off by more than its dtype's rounding explains, is not timed but noted.
    Where packages take part, torch.compile forgets what it has compiled. Call it on one rank at a time.

    Raises:
        UserError: the table cannot be written.
    """
    device = torch.device(device)
    measurements = []
    for shape in shapes:
        measurements.append(_measure(shape, device))
        save(device, measurements[-1:])
    return measurements


def _measure(shape: AttentionShape, device: torch.device) -> Measurement:
    calls: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    untraceable = []
    inputs = _inputs(shape, device)
    few = [x[:CHECKED_SAMPLES] for x in inputs]
    truth = _run(attention_reference, few, shape.training)
    for name, backend in BACKENDS.items():
        if name == "sdpa":  # one of the others
            continue
        reason = unavailable(name, device.type, device.index)
        reason = reason or unsupported(name, device.type, shape.dtype, shape.head_dim)
        try:
            if reason is None:
                reason = _disagreement(_run(backend.run, few, shape.training), truth)
                _run(backend.run, inputs, shape.training)
        except Exception as error:  # of whatever kind a foreign kernel raises
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if reason is not None:
            failures[name] = reason
            continue
        calls[name] = lambda run=backend.run: _run(run, inputs, shape.training)
        if backend.module is not None and not _traces(backend.run, few, shape.training):
            untraceable.append(name)
    return Measurement(shape, _times_us(calls, device), failures, tuple(untraceable))


def _inputs(shape: AttentionShape, device: torch.device) -> list[Tensor]:
    """q, k, v and the output's gradient, laid out as a transformer's are."""
    generator = torch.Generator(device).manual_seed(0)
    size = shape.batch, shape.tokens, 4, shape.heads, shape.head_dim
    parts = torch.randn(size, generator=generator, device=device).to(shape.dtype)
    return list(parts.permute(2, 0, 3, 1, 4).unbind())


def _run(function: Callable[..., Tensor], inputs: list[Tensor], training: bool) -> tuple[Tensor, ...]:
    """The output, and the gradients of q, k and v when training."""
    *qkv, grad = inputs
    if not training:
        with torch.no_grad():
            return (function(*qkv),)
    leaves = [x.detach().requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _disagreement(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> str | None:
    for one, true in zip(results, truth, strict=True):
        error, largest = float((one.float() - true).abs().max()), float(true.abs().max())
        if not error <= 8 * torch.finfo(one.dtype).eps * largest:
            return f"wrong result: off by {error:.2g} where the largest value is {largest:.2g}"
    return None


def _traces(function: Callable[..., Tensor], inputs: list[Tensor], training: bool) -> bool:
    torch.compiler.reset()  # or the limit on recompilations of one function would count against a later shape
    try:
        _run(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, training)
    except Exception:  # Dynamo's errors and the packages' own
        return False
    return True


def _times_us(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The median time of each call; rounds over all of them, so that a change of clocks hits none alone."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(NUM_ROUNDS):
        for name, call in calls.items():
            times[name].append(_time_us(call, device))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def _time_us(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    with torch.cuda.device(device):
        # Work ahead of the first event hides the launches: a training step queues its kernels just so.
        torch.cuda._sleep(1_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3
