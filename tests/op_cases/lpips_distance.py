from dataclasses import dataclass

import torch
from numerics import as_layout

from op_cases.common import Example, OpTests, Results, assert_op_within, num_repeats
from sendvae_fast.ops import lpips_distance, lpips_distance_reference, use_backend
from sendvae_fast.ops.registration import op_of


@dataclass(frozen=True)
class LpipsCase:
    """One input of lpips_distance. `spread` is how far apart the two feature maps are: small when training is done."""

    shape: tuple[int, int, int, int]
    layout0: str = "contiguous"
    layout1: str = "contiguous"
    spread: float = 1.0

    def __str__(self) -> str:
        layouts = dict.fromkeys((self.layout0, self.layout1))
        return "-".join(["x".join(map(str, self.shape)), *layouts, f"spread{self.spread}"])

    def inputs(self, dtype: torch.dtype, device: str, number: int) -> tuple[torch.Tensor, ...]:
        """f0, f1, weight."""
        generator = torch.Generator().manual_seed(4000 + number)
        # Scales differ from pixel to pixel by one order of magnitude.
        scale = torch.exp(torch.rand(self.shape[0], 1, *self.shape[2:], generator=generator) * 2)
        f0 = torch.randn(self.shape, generator=generator) * scale
        f1 = f0 + self.spread * scale * torch.randn(self.shape, generator=generator)
        return (
            as_layout(f0.to(device, dtype), self.layout0),
            as_layout(f1.to(device, dtype), self.layout1),
            torch.rand(self.shape[1], generator=generator).to(device),
        )


CASES = [
    LpipsCase((0, 4, 8, 8)),
    LpipsCase((0, 4, 8, 8), "channels_last", "channels_last"),
    LpipsCase((1, 1, 1, 1)),
    LpipsCase((3, 1, 5, 7), "channels_last", "channels_last"),
    LpipsCase((2, 5, 1, 1)),
    LpipsCase((2, 7, 1, 13), "channels_last", "channels_last"),
    LpipsCase((2, 7, 13, 1), "chunk", "chunk"),
    LpipsCase((3, 8, 9, 6), "transposed", "transposed"),
    LpipsCase((3, 8, 9, 6), "channels_last", "contiguous"),
    LpipsCase((3, 8, 9, 6), "contiguous", "channels_last", 0.1),
    LpipsCase((3, 6, 4, 5), "offset", "offset"),
    LpipsCase((2, 16, 15, 17), "channels_last_chunk", "channels_last", 0.1),
    LpipsCase((2, 16, 15, 17), "chunk", "contiguous"),
    LpipsCase((4, 33, 4, 8), "channels_last", "channels_last"),  # exactly one tile of pixels
    LpipsCase((4, 65, 3, 11)),  # one pixel and one channel more
    LpipsCase((4, 63, 3, 11), "channels_last", "offset"),
    LpipsCase((8, 64, 16, 20), "channels_last", "channels_last", 0.01),
    LpipsCase((8, 64, 16, 20), spread=0.01),
    LpipsCase((1, 3, 16, 16)),  # exactly one chunk of the CPU
    LpipsCase((1, 3, 1, 257)),  # one pixel more
    LpipsCase((2, 512, 6, 6), "channels_last", "channels_last"),
    LpipsCase((2, 512, 6, 6), "transposed", "contiguous"),
    LpipsCase((70, 12, 3, 3), "channels_last", "channels_last"),
    LpipsCase((32, 64, 24, 24), "channels_last", "channels_last", 0.1),
]
FEW_CASES = [
    LpipsCase((0, 4, 8, 8)),
    LpipsCase((129, 1, 1, 1)),
    LpipsCase((43, 8, 3, 6), "transposed", "channels_last"),
    LpipsCase((43, 33, 4, 8), "channels_last", "channels_last", 0.1),
    LpipsCase((32, 65, 3, 11), "offset", "chunk"),
    LpipsCase((64, 40, 3, 3), "channels_last_chunk", "channels_last", 0.01),
]


def check(case: LpipsCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Forward and backward of a backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    for number in range(num_repeats(case.shape[0])):
        *features, weight = case.inputs(dtype, device, number)
        upstream = torch.randn(case.shape[0], generator=torch.Generator().manual_seed(number)).to(device)
        for results, function, compute in (
            (actual, lpips_distance, dtype),
            (plain, lpips_distance_reference, dtype),
            (truth, lpips_distance_reference, torch.float64),
        ):
            leaves = [x.to(compute).detach().requires_grad_() for x in features]
            with use_backend(backend):
                distance = function(*leaves, weight)
            grads = ()
            if number < num_repeats(leaves[0].numel()):  # there are more gradients than distances
                grads = torch.autograd.grad(distance, leaves, upstream.to(distance.dtype))
            results.add({"distance": distance}, dict(zip(("f0", "f1"), grads, strict=False)))
    assert_op_within(actual, plain, truth)


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    def function(f0, f1, weight):
        # What a compiler may fuse and lay out as it likes; the gradient of one side only, as in training.
        return (lpips_distance((f0 * 1.0).detach(), f1 * 1.0, weight),)

    f0, f1, weight = LpipsCase((4, 40, 9, 7), "channels_last", "channels_last").inputs(dtype, device, number)
    return Example(function, (f0, f1.requires_grad_(), weight))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    calls = []
    for layout in ("contiguous", "channels_last"):
        f0, f1, weight = LpipsCase((2, 5, 4, 3), layout, layout).inputs(torch.float32, device, 0)
        _, stats = op_of("lpips_distance", backend)(f0, f1, weight)
        grad = torch.randn(2, device=device)
        calls += [
            ("lpips_distance_backward", (grad, f0, f1, weight, stats, *needed))
            for needed in ((False, True), (True, True))
        ]
        calls.append(("lpips_distance", (f0.clone(), f1.clone().requires_grad_(), weight)))
    return calls


TESTS = OpTests("lpips_distance", CASES, FEW_CASES, check, example, raw_calls)
