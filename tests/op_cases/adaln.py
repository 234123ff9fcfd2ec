from dataclasses import dataclass

import torch
from numerics import as_layout

from op_cases.common import Example, OpTests, Results, assert_op_within, num_repeats
from sendvae_fast.ops import adaln, adaln_reference, use_backend
from sendvae_fast.ops.registration import op_of


@dataclass(frozen=True)
class AdalnCase:
    """One input of adaln, x [B, N, D]."""

    shape: tuple[int, int, int]
    tokens_layout: str = "contiguous"
    modulation_layout: str = "chunk"
    grad_layout: str = "contiguous"
    has_branch: bool = True
    float_modulation: bool = False
    rms: bool = False

    def __str__(self) -> str:
        layouts = dict.fromkeys((self.tokens_layout, self.modulation_layout, self.grad_layout))
        flags = [
            *["alone"] * (not self.has_branch), *["float_modulation"] * self.float_modulation, *["rms"] * self.rms,
        ]  # fmt: skip
        return "-".join(["x".join(map(str, self.shape)), *layouts, *flags])

    def inputs(self, dtype: torch.dtype, device: str, number: int) -> dict[str, torch.Tensor]:
        """x, shift, scale and, with a branch, branch and gate."""
        generator = torch.Generator().manual_seed(3000 + number)
        batch, _, width = self.shape

        def tokens(mean):
            # Means and scales from token to token, as in a residual stream.
            x = torch.randn(self.shape, generator=generator) * (
                0.5 + torch.rand(self.shape[:2], generator=generator)[..., None]
            )
            x = x + mean * torch.randn(self.shape[:2], generator=generator)[..., None]
            return as_layout(x.to(device, dtype), self.tokens_layout)

        def row():
            x = torch.randn(batch, width, generator=generator)
            return as_layout(x.to(device, torch.float32 if self.float_modulation else dtype), self.modulation_layout)

        inputs = dict(x=tokens(2.0), shift=row(), scale=row())
        return inputs | dict(branch=tokens(0.0), gate=row()) if self.has_branch else inputs


CASES = [
    AdalnCase((0, 4, 8)),
    AdalnCase((2, 0, 8)),
    AdalnCase((2, 0, 8), has_branch=False),
    AdalnCase((1, 1, 2), "contiguous", "contiguous"),
    AdalnCase((7, 1, 3)),
    AdalnCase((1, 5, 31), "transposed", "transposed", "transposed"),
    AdalnCase((3, 33, 33), "transposed", "chunk", "offset"),
    AdalnCase((3, 5, 64), "offset", "offset", "offset"),
    AdalnCase((3, 32, 65), "offset", "chunk", "transposed", float_modulation=True),
    AdalnCase((2, 9, 127), "chunk", "contiguous", "chunk"),
    AdalnCase((2, 9, 128), "chunk", has_branch=False),
    AdalnCase((5, 31, 96)),
    AdalnCase((2, 65, 256), "contiguous", "transposed", float_modulation=True),
    AdalnCase((2, 70, 257), "chunk", "offset", "offset"),
    AdalnCase((4, 64, 384)),
    AdalnCase((4, 64, 384), has_branch=False, float_modulation=True),
    AdalnCase((3, 17, 768), "chunk", "chunk", "chunk", float_modulation=True),
    AdalnCase((2, 49, 1024), "offset"),
    AdalnCase((2, 100, 1152)),
    AdalnCase((2, 100, 1152), has_branch=False),
    AdalnCase((1, 3, 1536), "transposed"),
    AdalnCase((2, 35, 2048), float_modulation=True),
    AdalnCase((1, 34, 2050)),
    AdalnCase((1, 5, 4096)),
    AdalnCase((1, 5, 4096), has_branch=False),
    AdalnCase((2, 37, 4104)),  # wider than CUDA keeps in registers
    AdalnCase((1, 35, 4101), "chunk", "chunk", "offset", has_branch=False, float_modulation=True),
    AdalnCase((8, 256, 768)),
    AdalnCase((1, 1, 2), rms=True),
    AdalnCase((1, 3, 768), rms=True),
    AdalnCase((3, 33, 33), "transposed", "chunk", "offset", rms=True),
    AdalnCase((2, 65, 256), float_modulation=True, rms=True),
    AdalnCase((4, 64, 384), has_branch=False, rms=True),
    AdalnCase((2, 100, 1152), float_modulation=True, rms=True),
    AdalnCase((2, 37, 4104), rms=True),
    AdalnCase((1, 35, 4101), "chunk", "chunk", "offset", has_branch=False, float_modulation=True, rms=True),
    # Each number of vectors that a CUDA thread keeps, with either modulation.
    *(
        AdalnCase((1, 3, width), float_modulation=fp32)
        for width in (768, 1024, 1152, 2048, 4096, 4104)
        for fp32 in (False, True)
    ),
]
FEW_CASES = [
    AdalnCase((0, 4, 8)),
    AdalnCase((2, 0, 8)),
    AdalnCase((5, 18, 9), "offset", "offset", "offset"),
    AdalnCase((3, 34, 65), "transposed", "chunk", "transposed", float_modulation=True),
    AdalnCase((2, 33, 128), "chunk", "chunk", "chunk"),
    AdalnCase((2, 19, 66), "offset", "chunk", float_modulation=True, rms=True),
    AdalnCase((2, 5, 257), "chunk", "transposed", has_branch=False),
    AdalnCase((2, 3, 1152)),
]


def check(case: AdalnCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Forward and backward of a backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    # By the gradients of the modulation, the smallest of the outputs.
    for number in range(num_repeats(case.shape[0] * min(case.shape[1], 1) * case.shape[2])):
        inputs = case.inputs(dtype, device, number)
        generator = torch.Generator().manual_seed(number)
        upstream = [
            as_layout(torch.randn(case.shape, generator=generator).to(device, dtype), case.grad_layout)
            for _ in range(2)
        ]
        for results, function, compute in (
            (actual, adaln, None),
            (plain, adaln_reference, None),
            (truth, adaln_reference, torch.float64),
        ):
            leaves = {name: x.to(compute or x.dtype).detach().requires_grad_() for name, x in inputs.items()}
            with use_backend(backend):
                y, s = function(**leaves, rms=case.rms)
            if not case.has_branch:
                assert s is leaves["x"]
            outputs = dict(y=y, s=s) if case.has_branch else dict(y=y)
            assert all(x.is_contiguous() for x in outputs.values())
            grads = torch.autograd.grad(
                tuple(outputs.values()),
                tuple(leaves.values()),
                [grad.to(y.dtype) for grad in upstream[: len(outputs)]],
            )
            results.add(outputs, dict(zip(leaves, grads, strict=True)))
    assert_op_within(actual, plain, truth)


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    def function(x, branch, modulation):
        # Two halves of a block, around something that a compiler may fuse and lay out as it likes.
        shift1, scale1, gate, shift2, scale2, _ = (modulation * 1.0).chunk(6, dim=1)
        y, x = adaln(x * 1.0, shift1, scale1)
        return adaln(x, shift2, scale2, branch=0.5 * y - branch, gate=gate)

    inputs = AdalnCase((4, 35, 96)).inputs(dtype, device, number)
    row, gate = inputs["scale"], inputs["gate"]
    modulation = torch.cat((row, 0.5 * row, gate, gate.flip(0), row.flip(1), gate), dim=1)
    return Example(function, tuple(x.requires_grad_() for x in (inputs["x"], inputs["branch"], modulation)))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    calls = []
    for case in (AdalnCase((2, 5, 24)), AdalnCase((2, 5, 24), has_branch=False, float_modulation=True, rms=True)):
        inputs = case.inputs(torch.float32, device, 0)
        x, branch, gate, shift, scale = (inputs.get(name) for name in ("x", "branch", "gate", "shift", "scale"))
        _, s, stats = op_of("adaln", backend)(x, branch, gate, shift, scale, 1e-6, case.rms)
        grad_y, grad_s = torch.randn_like(x), torch.randn_like(x)
        saved = (x if branch is None else s, branch, gate, scale, stats, case.rms)
        calls += [("adaln_backward", (grad_y, grad, *saved)) for grad in (grad_s, None)]
        leaves = (t if t is None else t.detach().requires_grad_() for t in (x, branch, gate, shift, scale))
        calls.append(("adaln", (*leaves, 1e-6, case.rms)))
    return calls


TESTS = OpTests("adaln", CASES, FEW_CASES, check, example, raw_calls)
