"""One case of a kernel benchmark, measured: rows of JSON, one per case and pass."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from bench.kernel_cases.case import KernelCase, Work
from bench.timing import Call, Timing, time_cuda_graph, time_interleaved
from sendvae_fast.errors import UserError
from sendvae_fast.ops import chosen_backend, use_backend
from sendvae_fast.ops.dispatch import OPS

COPY = "copy"
EAGER, COMPILED = "eager", "torch.compile"
EAGER_NCHW = "eager NCHW"
FORWARD, WITH_BACKWARD = "forward", "forward+backward"
CACHES = 3
"""The input sets, and the outputs kept, are together this many times the last-level cache."""
MIN_SETS, MAX_SETS = 2, 512


@dataclass(frozen=True)
class Effort:
    """How much a measurement may cost."""

    seconds: float
    """Timed, per row."""
    sample_s: float = 1e-3
    """The least length of a sample: shorter calls are repeated."""
    compile: bool = True
    """Whether torch.compile is a yardstick."""
    graph_replays: int = 20
    """Replays of the CUDA graph of each form."""
    op_limit_s: float = 180
    """The time all cases of one op have, compilation included; then its process is ended."""


@dataclass
class Form:
    """One way of doing the work, and its results."""

    name: str
    work: Work
    backend: str | None = None  # forced around it
    checked: bool = True  # it must give what the eager form gives
    contiguous: bool = False  # works on contiguous copies of channels-last inputs
    error: str | None = None


def rows_of(
    op: str, case: KernelCase, device: torch.device, cache_bytes: int, effort: Effort
) -> Iterator[dict[str, Any]]:
    """The rows of a case: forward, then forward with backward if there is one. What fails is in the row."""
    passes = {FORWARD: case.forward_bytes}
    if case.backward_bytes is not None:
        passes[WITH_BACKWARD] = case.forward_bytes + case.backward_bytes
    for name, least_bytes in passes.items():
        chosen = chosen_backend(op, device) if op in OPS else op
        row = {"op": op, "case": case.name, "pass": name, "bytes": least_bytes, "chosen": chosen}
        try:
            with torch.no_grad() if name == FORWARD else nullcontext():
                row["forms"] = measure(op, case, device, least_bytes, cache_bytes, effort)
        except Exception as error:  # the inputs themselves, or the eager form
            row["error"] = one_line(error)
        yield row


def measure(
    op: str, case: KernelCase, device: torch.device, least_bytes: int, cache_bytes: int, effort: Effort
) -> dict[str, dict[str, Any]]:
    """Timings or the error of each form, by its name."""
    num_sets = min(MAX_SETS, max(MIN_SETS, math.ceil(CACHES * cache_bytes / least_bytes)))
    bench = CaseBench(case, device, num_sets)
    forms = forms_of(op, case, device, effort)
    for form in forms:
        bench.prepare(form)
    calls = {form.name: bench.call(form) for form in forms if form.error is None}
    calls[COPY] = copy_call(least_bytes, num_sets, device)
    timings = time_interleaved(device, calls, num_sets, effort.seconds, effort.sample_s)
    results = {
        name: {**rounded(timing), "gb_per_s": round(least_bytes / timing.median_us / 1e3, 2)}
        for name, timing in timings.items()
    }
    results |= {form.name: {"error": form.error} for form in forms if form.error is not None}
    if device.type == "cuda":
        for name, call in calls.items():
            results[name] |= graph_result(call, num_sets, least_bytes, effort.graph_replays)
    return results


class CaseBench:
    """The input sets of one case and the calls on them."""

    def __init__(self, case: KernelCase, device: torch.device, num_sets: int):
        self.case, self.device = case, device
        self.sets = [case.inputs(number) for number in range(num_sets)]
        # Checked against fresh input sets, for forms that work in place; its outputs give the gradients' shapes.
        self.expected = outputs_of(case.eager, case.inputs(0))
        self.upstream = [[torch.randn_like(x) for x in self.expected if x.requires_grad] for _ in range(num_sets)]
        self.expected = [x.detach() for x in self.expected]
        self._contiguous: tuple[list[Any], list[Any]] | None = None

    def prepare(self, form: Form) -> None:
        """Run a form once, so that it is compiled, and compare it with the eager one; its error is kept in it."""
        try:
            with backend_context(form):
                outputs = outputs_of(form.work, self.case.inputs(0))
            form.error = self._difference(outputs) if form.checked else None
            if form.error is None:
                self.call(form)(0)  # the backward is compiled at its first call
        except Exception as error:
            form.error = one_line(error)

    def call(self, form: Form) -> Call:
        """The form's work on one input set; outputs live until the set's turn comes again, so that they rotate too."""
        kept: list[Any] = [None] * len(self.sets)
        sets, upstream = self._contiguous_sets() if form.contiguous else (self.sets, self.upstream)

        def run(number: int) -> None:
            tensors = sets[number]
            kept[number] = None
            with backend_context(form):
                outputs = outputs_of(form.work, tensors)
                if torch.is_grad_enabled():
                    roots = [x for x in outputs if x.requires_grad]
                    leaves = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]
                    outputs = torch.autograd.grad(roots, leaves, upstream[number])
            kept[number] = outputs

        return run

    def _contiguous_sets(self) -> tuple[list[Any], list[Any]]:
        """The input sets and upstream gradients in contiguous copies, made once."""
        if self._contiguous is None:
            self._contiguous = tree_map(contiguous_copy, self.sets), tree_map(contiguous_copy, self.upstream)
        return self._contiguous

    def _difference(self, outputs: tuple[torch.Tensor, ...]) -> str | None:
        """Why these outputs are not those of the eager form, or None."""
        if len(outputs) != len(self.expected):
            return f"{len(outputs)} outputs, the eager form has {len(self.expected)}"
        for number, (actual, expected) in enumerate(zip(outputs, self.expected, strict=True)):
            if actual.shape != expected.shape:
                return f"output {number} is {list(actual.shape)}, the eager form's {list(expected.shape)}"
            scale = torch.linalg.vector_norm(expected.double()).clamp_min(1e-30)
            error = (torch.linalg.vector_norm(actual.detach().double() - expected.double()) / scale).item()
            if not error <= self.case.tolerance:  # NaN too
                return f"output {number} differs from the eager form's by {error:.1e}"
        return None


def forms_of(op: str, case: KernelCase, device: torch.device, effort: Effort) -> list[Form]:
    """Eager, compiled, the case's yardsticks, and every backend that runs on the device.

    Triton on the CPU is its interpreter, a test tool: never timed.
    """
    forms = [Form(EAGER, case.eager)]
    if case.compiles and effort.compile:
        torch._dynamo.reset()  # lest earlier cases use up the limit of recompilations
        compiled = torch.compile(case.to_compile or case.eager, fullgraph=True, dynamic=False)
        forms.append(Form(COMPILED, compiled, checked=case.to_compile is None))
    if case.nchw:
        forms.append(Form(EAGER_NCHW, case.eager, checked=False, contiguous=True))
    forms += [Form(name, work, checked=False) for name, work in case.yardsticks.items()]
    if op not in OPS:
        return [*forms, Form(op, case.fused)]
    backends = [name for name in OPS[op] if name != "reference" and (name, device.type) != ("triton", "cpu")]
    for backend in backends:
        try:
            with use_backend(backend):
                if chosen_backend(op, device) != backend:
                    continue
        except UserError:
            continue
        forms.append(Form(backend, case.fused, backend))
    return forms


def copy_call(least_bytes: int, num_sets: int, device: torch.device) -> Call:
    """A copy that reads and writes `least_bytes` in all, between buffers that rotate like the inputs."""
    source, destination = (torch.rand(num_sets, max(1, least_bytes // 8), device=device) for _ in range(2))
    return lambda number: destination[number].copy_(source[number])


def graph_result(call: Call, num_sets: int, least_bytes: int, repeats: int) -> dict[str, Any]:
    try:
        timing = time_cuda_graph(call, num_sets, repeats)
    except Exception as error:
        torch.cuda.synchronize()
        return {"graph_error": one_line(error)}
    return {"graph": {**rounded(timing), "gb_per_s": round(least_bytes / timing.median_us / 1e3, 2)}}


def contiguous_copy(value: Any) -> Any:
    """A leaf of the same numbers, contiguous in memory; what is no tensor stays."""
    return value.detach().contiguous().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value


def backend_context(form: Form):
    return nullcontext() if form.backend is None else use_backend(form.backend)


def outputs_of(work: Callable[..., Any], tensors: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    outputs = work(*tensors)
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def rounded(timing: Timing) -> dict[str, Any]:
    return {key: round(value, 3) for key, value in asdict(timing).items()}


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
