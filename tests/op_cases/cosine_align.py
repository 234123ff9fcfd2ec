from dataclasses import dataclass

import torch
from numerics import as_layout

from op_cases.common import Example, OpTests, Results, assert_op_within, num_repeats
from sendvae_fast.ops import cosine_align, cosine_align_reference, use_backend
from sendvae_fast.ops.registration import op_of


@dataclass(frozen=True)
class CosineCase:
    """One input of cosine_align, [..., N, D]."""

    shape: tuple[int, ...]
    features_layout: str = "contiguous"
    target_layout: str = "contiguous"
    reduction: str = "none"
    margin: float | None = None

    def __str__(self) -> str:
        layouts = dict.fromkeys((self.features_layout, self.target_layout))
        margin = [f"margin{self.margin}"] * (self.margin is not None)
        return "-".join(["x".join(map(str, self.shape)), *layouts, self.reduction, *margin])

    def inputs(self, dtype: torch.dtype, device: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(2000 + number)
        features = torch.randn(self.shape, generator=generator)
        # Correlated, with scales from row to row as a foundation model's.
        target = 0.5 * features + torch.randn(self.shape, generator=generator)
        target = target * torch.exp(torch.randn(self.shape[:-1], generator=generator))[..., None]
        return (
            as_layout(features.to(device, dtype), self.features_layout),
            as_layout(target.to(device, dtype), self.target_layout),
        )


CASES = [
    CosineCase((0, 4, 8)),
    CosineCase((2, 0, 8)),
    CosineCase((1, 1)),
    CosineCase((1, 1, 2)),
    CosineCase((7, 3)),
    CosineCase((1, 5, 31), "transposed"),
    CosineCase((3, 5, 33), "transposed", "transposed"),
    CosineCase((3, 5, 64), "offset", "offset"),
    CosineCase((3, 5, 65), "offset"),
    CosineCase((3, 5, 66), "padded", "padded"),  # aligned rows whose last vector is not full
    CosineCase((2, 9, 127), "chunk", "chunk"),
    CosineCase((2, 9, 128), "chunk", "offset"),
    CosineCase((2, 9, 255), "contiguous", "chunk"),
    CosineCase((2, 9, 256)),
    CosineCase((2, 9, 257)),
    CosineCase((2, 3, 4, 48)),
    CosineCase((2, 3, 4, 50), "channels_last", "chunk"),
    CosineCase((4, 16, 384), reduction="sample"),
    CosineCase((2, 7, 768), reduction="mean"),
    CosineCase((2, 5, 768), "offset", "chunk", "mean"),
    CosineCase((2, 16, 1024)),
    CosineCase((2, 17, 1025), "transposed", "offset", "sample"),
    CosineCase((1, 3, 4099)),
    CosineCase((8, 256, 768), "contiguous", "chunk"),
    # Cosines are about 0.45 here, spread the more the smaller D: these margins bind for some patches.
    CosineCase((0, 4, 8), margin=0.5),
    CosineCase((40, 3), margin=0.0),
    CosineCase((8, 5, 33), "transposed", "offset", margin=0.5),
    CosineCase((4, 16, 65), "chunk", "transposed", "sample", margin=0.6),
    CosineCase((2, 9, 96), "contiguous", "chunk", "mean", margin=0.5),
    CosineCase((9, 300, 3), reduction="mean"),  # more blocks than one of them has threads
]
FEW_CASES = [
    CosineCase((0, 4, 8)),
    CosineCase((130, 3)),
    CosineCase((13, 11, 65), "offset", "transposed"),
    CosineCase((2, 65, 257), "chunk", "offset"),
    CosineCase((3, 43, 768), "contiguous", "chunk"),
    CosineCase((129, 1, 12), reduction="sample"),
    CosineCase((40, 3), margin=0.0),
    CosineCase((4, 33, 65), "offset", "transposed", margin=0.5),
]


def check(case: CosineCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Forward and backward of a backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    kept = {"none": case.shape[:-1], "sample": case.shape[:-2], "mean": ()}[case.reduction]
    num_distances = torch.Size(kept).numel()
    for number in range(num_repeats(num_distances)):
        inputs = case.inputs(dtype, device, number)
        upstream = None
        for results, function, compute in (
            (actual, cosine_align, dtype),
            (plain, cosine_align_reference, dtype),
            (truth, cosine_align_reference, torch.float64),
        ):
            features, target = (x.to(compute).detach().requires_grad_() for x in inputs)
            with use_backend(backend):
                distance = function(features, target, reduction=case.reduction, margin=case.margin)
            if upstream is None:
                upstream = torch.randn(distance.shape, generator=torch.Generator().manual_seed(number)).to(device)
            grad_features, grad_target = torch.autograd.grad(distance, (features, target), upstream.to(distance.dtype))
            results.add({"distance": distance}, {"features": grad_features, "target": grad_target})
    assert_op_within(actual, plain, truth)


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    def function(features, target):
        # What a compiler may fuse and lay out as it likes, with a token dropped as a class token is.
        features, target = (features * 1.0)[:, 1:], (target * 1.0)[:, 1:]
        distances = (cosine_align(features, target, reduction="none", margin=margin) for margin in (None, 0.5))
        return *distances, cosine_align(features, target)

    inputs = CosineCase((4, 17, 300)).inputs(dtype, device, number)
    return Example(function, tuple(x.requires_grad_() for x in inputs))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    features, target = (x.requires_grad_() for x in CosineCase((6, 48)).inputs(torch.float32, device, 0))
    f, y = features.detach(), target.detach()
    _, stats = op_of("cosine_align", backend)(f, y, 1e-8, None, False)
    grad = torch.randn(6, device=device)
    return [
        *(
            ("cosine_align", (features, other, 1e-8, margin, mean))
            for other, mean in ((target, False), (y, False), (y, True))
            for margin in (None, 0.5)
        ),
        *(
            ("cosine_align_backward", (given, f, y, stats, 1e-8, margin, need_target))
            for given in (grad, grad[0])
            for margin in (None, 0.5)
            for need_target in (False, True)
        ),
    ]


TESTS = OpTests("cosine_align", CASES, FEW_CASES, check, example, raw_calls)
