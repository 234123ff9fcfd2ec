"""Records the launches that ops make for benchmark cases at their full sizes, for `python -m bench kernels --predict`.

Run as a script: the CUDA kernels that build.py makes for g++ take the place of the CPU ops in this process. It gets a
line of JSON with the op and those whose kernels its cases need, and prints a line with the launches of every case and
pass. No kernel runs, and large tensors are never touched, so that a case of 14 GB takes none.
"""

import bisect
import ctypes
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from bench.kernel_cases import cases_of
from bench.kernel_rows import FORWARD, WITH_BACKWARD, outputs_of
from cuda_on_cpu import build
from sendvae_fast.ops import use_backend

SMALL_BYTES = 1 << 20
FREE = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "promote_types", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsafe_split", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
"""Operators that launch nothing."""


class OtherKernels(TorchDispatchMode):
    """PyTorch's own operators, each of which is a kernel of its own: name and bytes of all its tensors."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, name = func.name().split("::", 1)
        name = name.split(".", 1)[0]
        if namespace == "aten" and name not in FREE:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.found.append((name, sum(x.numel() * x.element_size() for x in tensors)))
        return out


class Library:
    """The kernels of an op, which record what they are launched with."""

    def __init__(self, op: str):
        path = build.op_library(op, "plain")
        torch.ops.load_library(path)
        self.runtime = ctypes.CDLL(str(path))
        self.runtime.cuda_on_cpu_records.restype = ctypes.c_char_p
        self.runtime.cuda_on_cpu_start_recording()
        self.kernels = build.kernels(path)
        self.begins = sorted(self.kernels)

    def records(self) -> dict[str, list]:
        """Launches and tensors since the last call, kernels by name."""
        found = json.loads(self.runtime.cuda_on_cpu_records())
        for launch in found["launches"]:
            launch["kernel"] = self.kernels[self.begins[bisect.bisect_right(self.begins, launch["kernel"]) - 1]]
        return found


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    libraries = [Library(op) for op in job["libraries"]]
    print(json.dumps(list(recorded_cases(job["op"], libraries))))


def recorded_cases(op: str, libraries: list[Library]) -> Iterator[dict[str, Any]]:
    """The launches of every case and pass, in their order."""
    for case in cases_of(op, torch.device("meta")):
        passes = {FORWARD: case.forward_bytes}
        if case.backward_bytes is not None:
            passes[WITH_BACKWARD] = case.forward_bytes + case.backward_bytes
        for name, least_bytes in passes.items():
            inputs = tree_map(untouched, case.inputs(0))
            others = OtherKernels()
            with use_backend("cpu"), torch.set_grad_enabled(name == WITH_BACKWARD), others:
                outputs = outputs_of(case.fused, inputs)
                if name == WITH_BACKWARD:
                    roots = [x for x in outputs if x.requires_grad]
                    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
                    with _disable_current_modes():  # gradients that come from elsewhere are none of the op's work
                        upstream = [untouched(x) for x in roots]
                    torch.autograd.grad(roots, leaves, upstream)
            launches, tensors = [], []
            for library in libraries:
                records = library.records()
                launches += records["launches"]
                tensors += records["tensors"]
            launches.sort(key=lambda launch: launch["time_ns"])
            yield {
                "op": op, "case": case.name, "pass": name, "bytes": least_bytes,
                "launches": launches, "tensors": tensors, "others": others.found,
            }  # fmt: skip


def untouched(value: Any) -> Any:
    """Memory like a tensor's: zeros where it is small, else as the system gives it, not yet there."""
    if not isinstance(value, torch.Tensor):
        return value
    out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if out.numel() * out.element_size() <= SMALL_BYTES:
        out.zero_()
    return out.requires_grad_(value.requires_grad)


if __name__ == "__main__":
    main()
