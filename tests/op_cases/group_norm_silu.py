from dataclasses import dataclass

import torch
from numerics import as_layout

from op_cases.common import Example, OpTests, Results, assert_op_within, num_repeats
from sendvae_fast.ops import group_norm_silu, group_norm_silu_reference, use_backend
from sendvae_fast.ops.registration import op_of


@dataclass(frozen=True)
class GroupNormCase:
    """One input of group_norm_silu, [B, C, H, W]."""

    shape: tuple[int, int, int, int]
    num_groups: int
    layout: str = "channels_last"
    residual_layout: str | None = None  # None: no residual
    grad_layout: str = "channels_last"
    silu: bool = True
    offset: float = 0.0  # how far the mean is from 0, in standard deviations

    def __str__(self) -> str:
        layouts = dict.fromkeys(x for x in (self.layout, self.residual_layout, self.grad_layout) if x)
        flags = ["residual"] * bool(self.residual_layout) + ["norm"] * (not self.silu) + ["offset"] * bool(self.offset)
        return "-".join(["x".join(map(str, self.shape)), f"{self.num_groups}groups", *layouts, *flags])

    def inputs(self, dtype: torch.dtype, device: str, number: int) -> tuple[torch.Tensor | None, ...]:
        """x, residual or None, weight, bias."""
        generator = torch.Generator().manual_seed(3000 + number)
        channels = self.shape[1]

        def normal(shape):
            return torch.randn(shape, generator=generator)

        # Scales and means that differ from channel to channel, as those of features do.
        x = normal(self.shape) * (0.5 + torch.rand((channels, 1, 1), generator=generator)) + normal((channels, 1, 1))
        x, residual = x + self.offset, normal(self.shape)
        weight, bias = 1 + 0.3 * normal((channels,)), 0.3 * normal((channels,))
        return (
            as_layout(x.to(device, dtype), self.layout),
            as_layout(residual.to(device, dtype), self.residual_layout) if self.residual_layout else None,
            weight.to(device),
            bias.to(device),
        )


CASES = [
    GroupNormCase((0, 4, 3, 3), 2),
    GroupNormCase((0, 4, 3, 3), 2, "contiguous", "channels_last"),
    GroupNormCase((1, 2, 1, 1), 1),
    GroupNormCase((3, 8, 1, 1), 2),
    GroupNormCase((2, 9, 1, 5), 3, "channels_last_chunk", "chunk", "contiguous"),
    GroupNormCase((2, 7, 5, 3), 7),  # C / G = 1
    GroupNormCase((3, 6, 5, 7), 2, "contiguous", "contiguous", "contiguous"),
    GroupNormCase((3, 15, 5, 7), 5, "offset", "offset", "offset"),
    GroupNormCase((2, 33, 7, 5), 11, "transposed", grad_layout="offset"),
    GroupNormCase((2, 33, 9, 4), 1, silu=False),
    GroupNormCase((2, 8, 6, 6), 2, "channels_last_chunk"),
    GroupNormCase((2, 64, 4, 4), 32, "channels_last", "channels_last"),
    GroupNormCase((2, 64, 4, 4), 2, silu=False),
    GroupNormCase((4, 12, 16, 16), 3, "channels_last", "contiguous", silu=False),
    GroupNormCase((1, 1, 33, 31), 1),
    GroupNormCase((1, 3, 33, 35), 3, "offset"),
    GroupNormCase((1, 8, 128, 130), 2, "channels_last", "channels_last"),  # several chunks of pixels
    GroupNormCase((1, 24, 64, 66), 4),
    GroupNormCase((2, 128, 16, 17), 32),
    GroupNormCase((1, 512, 8, 8), 32, "channels_last", "channels_last"),
    GroupNormCase((2, 6, 4, 5), 3, "channels_last", "offset", silu=False),
    # Groups wider than a block of the CUDA kernels.
    GroupNormCase((2, 640, 5, 6), 2),
    GroupNormCase((1, 640, 9, 8), 2, "channels_last", "channels_last", silu=False),
    GroupNormCase((1, 1032, 3, 5), 4),
    GroupNormCase((1, 2049, 2, 2), 3, "channels_last", "offset"),
    GroupNormCase((2, 16, 24, 24), 4, offset=300.0),
    GroupNormCase((1, 8, 96, 96), 2, "channels_last", "channels_last", silu=False, offset=3000.0),
    GroupNormCase((8, 64, 16, 16), 2),
    GroupNormCase((70, 8, 3, 3), 4, "contiguous"),
    GroupNormCase((1, 128, 96, 96), 32),
]
FEW_CASES = [
    GroupNormCase((0, 4, 3, 3), 2, "contiguous", "channels_last"),
    GroupNormCase((3, 16, 1, 1), 4),
    GroupNormCase((3, 45, 5, 7), 15, "offset", "offset", "offset"),
    GroupNormCase((2, 43, 5, 3), 43, silu=False),
    GroupNormCase((1, 8, 40, 41), 2, "channels_last", "channels_last", offset=300.0),
    GroupNormCase((2, 132, 9, 9), 3, "transposed"),
]


def check(case: GroupNormCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Forward and backward of a backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    # By the gradients of weight and bias, the smallest of what is compared: C values each, however large the map.
    for number in range(num_repeats(case.shape[1] * min(case.shape[0], 1))):
        x, residual, *parameters = case.inputs(dtype, device, number)
        generator = torch.Generator().manual_seed(number)
        upstream = [
            as_layout(torch.randn(case.shape, generator=generator).to(device, dtype), case.grad_layout)
            for _ in range(1 if residual is None else 2)
        ]
        maps = {"x": x} if residual is None else {"x": x, "residual": residual}
        for results, function, double in (
            (actual, group_norm_silu, False),
            (plain, group_norm_silu_reference, False),
            (truth, group_norm_silu_reference, True),
        ):
            # `to` keeps the layout, and detach makes a leaf of a view.
            leaves = {
                name: (tensor.double() if double else tensor).detach().requires_grad_()
                for name, tensor in (*maps.items(), *zip(("weight", "bias"), parameters, strict=True))
            }
            with use_backend(backend):
                out = function(**leaves, num_groups=case.num_groups, silu=case.silu)
            outputs = {"y": out} if residual is None else dict(zip(("y", "s"), out, strict=True))
            for tensor in outputs.values():
                assert tensor.is_contiguous(memory_format=torch.channels_last)
            grads = torch.autograd.grad(
                tuple(outputs.values()),
                tuple(leaves.values()),
                [grad.double() if double else grad for grad in upstream],
            )
            results.add(outputs, dict(zip(leaves, grads, strict=True)))
    assert_op_within(actual, plain, truth)


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    def function(x, residual, weight, bias):
        # What a compiler may fuse and lay out as it likes; the sum is used again, as a residual block does.
        y, s = group_norm_silu(x * 1.0, weight, bias, 4, residual=residual * 1.0)
        return y, s, group_norm_silu(s, weight, bias, 2, silu=False)

    case = GroupNormCase((3, 24, 40, 41), 4, "channels_last", "contiguous")
    return Example(function, tuple(x.requires_grad_() for x in case.inputs(dtype, device, number)))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    case = GroupNormCase((2, 12, 5, 6), 3, "channels_last", "contiguous")
    inputs = [x.requires_grad_() for x in case.inputs(torch.float32, device, 0)]
    x, residual, weight, bias = (x.detach() for x in inputs)
    _, s, stats = op_of("group_norm_silu", backend)(x, residual, weight, bias, 3, 1e-6, True)
    backward = (s, stats, weight, bias, 3)
    return [
        ("group_norm_silu", (*inputs, 3, 1e-6, True)),
        ("group_norm_silu", (inputs[0], None, *inputs[2:], 3, 1e-6, False)),
        ("group_norm_silu_backward", (x, None, *backward, True)),
        ("group_norm_silu_backward", (residual, x, *backward, False)),
    ]


TESTS = OpTests("group_norm_silu", CASES, FEW_CASES, check, example, raw_calls)
