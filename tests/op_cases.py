"""The matrix both the CPU and the GPU tests run each op through: shapes, layouts, and the comparison with truth."""

from dataclasses import dataclass, field

import pytest
import torch
from numerics import BACKWARD_FACTOR, FORWARD_FACTOR, as_layout, assert_error_within

from sendvae_fast.errors import UserError
from sendvae_fast.ops import (
    chosen_backend,
    cosine_align,
    cosine_align_reference,
    noise_inject,
    noise_inject_reference,
    philox,
    use_backend,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A case with fewer outputs than this is repeated with other numbers until it has given as many.
MIN_ELEMENTS = 128
MIN_DISTANCES = 128


def require_backend(op: str, backend: str, device: str = "cpu") -> None:
    """Skip the test, with the reason, where the backend cannot run on tensors of the device."""
    try:
        with use_backend(backend):
            chosen_backend(op, device)
    except UserError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class NoiseCase:
    """One input of noise_inject. The name in a test's id is `str(case)`."""

    shape: tuple[int, int, int, int]
    mean_layout: str = "contiguous"
    spread_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    spread_is_std: bool = False
    given_t: bool = False

    def __str__(self) -> str:
        layouts = dict.fromkeys((self.mean_layout, self.spread_layout, self.grad_layout))
        flags = ["std"] * self.spread_is_std + ["given_t"] * self.given_t
        return "-".join(["x".join(map(str, self.shape)), *layouts, *flags])

    def inputs(self, dtype: torch.dtype, device: str, number: int) -> tuple[torch.Tensor, ...]:
        """mean, spread, latent_mean, latent_std, key, sample_ids, t or None."""
        generator = torch.Generator().manual_seed(1000 + number)
        batch, channels = self.shape[:2]
        mean = torch.randn(self.shape, generator=generator)
        # Standard deviations of one order of magnitude, lest one element's error be all that counts.
        spread = torch.rand(self.shape, generator=generator) * 6 - 4
        if self.spread_is_std:
            spread = torch.exp(0.5 * spread)
        latent_mean = torch.randn(channels, generator=generator)
        latent_std = torch.rand(channels, generator=generator) + 0.5
        sample_ids = torch.randint(2**62, (batch,), generator=generator)
        t = torch.rand(batch, generator=generator) if self.given_t else None
        key = philox.make_key(7, number)
        return tuple(
            x if x is None else x.to(device)
            for x in (
                as_layout(mean.to(device, dtype), self.mean_layout),
                as_layout(spread.to(device, dtype), self.spread_layout),
                latent_mean, latent_std, key, sample_ids, t,
            )
        )  # fmt: skip


NOISE_CASES = [
    NoiseCase((0, 4, 8, 8)),
    NoiseCase((0, 4, 8, 8), "chunk", "chunk"),
    NoiseCase((1, 1, 1, 1)),
    NoiseCase((1, 1, 1, 1), spread_is_std=True),
    NoiseCase((3, 1, 1, 2)),
    NoiseCase((2, 5, 1, 1)),
    NoiseCase((5, 3, 5, 7)),
    NoiseCase((1, 3, 5, 7), "transposed", "transposed", "transposed"),
    NoiseCase((2, 7, 1, 13), "chunk", "chunk", "channels_last"),
    NoiseCase((2, 7, 13, 1), "channels_last", "chunk", "transposed"),
    NoiseCase((4, 4, 8, 8), "chunk", "chunk"),
    NoiseCase((4, 4, 8, 8), "chunk", "chunk", spread_is_std=True),
    NoiseCase((3, 4, 8, 8), given_t=True),
    NoiseCase((3, 8, 9, 6), "channels_last", "channels_last", "channels_last"),
    NoiseCase((3, 8, 9, 6), "channels_last_chunk", "channels_last_chunk", "channels_last"),
    NoiseCase((3, 6, 4, 5), "offset", "offset", "offset"),
    NoiseCase((2, 16, 15, 17), "offset", "chunk", "channels_last"),
    NoiseCase((2, 16, 16, 16), "contiguous", "transposed", "offset", given_t=True),
    NoiseCase((1, 33, 31, 3), "channels_last_chunk", "offset"),
    NoiseCase((1, 4, 16, 16)),  # exactly one Triton tile
    NoiseCase((1, 1, 25, 41)),  # one element more
    NoiseCase((2, 32, 16, 16), "chunk", "chunk"),
    NoiseCase((2, 64, 16, 16), spread_is_std=True, given_t=True),
    NoiseCase((70, 4, 3, 3), "chunk", "chunk"),
    NoiseCase((16, 32, 32, 32), "chunk", "chunk"),
]
FEW_NOISE_CASES = [
    NoiseCase((0, 4, 8, 8)),
    NoiseCase((1, 1, 25, 41)),
    NoiseCase((5, 3, 5, 7), "chunk", "chunk", "transposed"),
    NoiseCase((3, 8, 9, 6), "channels_last_chunk", "channels_last_chunk", "channels_last"),
    NoiseCase((3, 6, 4, 5), "offset", "transposed", "offset", spread_is_std=True),
    NoiseCase((2, 16, 15, 17), "offset", "chunk", "channels_last", given_t=True),
]


@dataclass
class Results:
    """Outputs and gradients of repeated runs, gathered by name for one comparison."""

    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    grads: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, outputs: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
        for gathered, new in ((self.outputs, outputs), (self.grads, grads)):
            for name, tensor in new.items():
                gathered.setdefault(name, []).append(tensor.detach())


def assert_op_within(actual: Results, plain: Results, truth: Results) -> None:
    for name in truth.outputs:
        assert_error_within(
            actual.outputs[name], plain.outputs[name], truth.outputs[name], FORWARD_FACTOR, f"output {name}"
        )
    for name in truth.grads:
        assert_error_within(
            actual.grads[name], plain.grads[name], truth.grads[name], BACKWARD_FACTOR, f"gradient of {name}"
        )


def check_noise_inject(case: NoiseCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Forward and backward of a backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    num_elements = torch.Size(case.shape).numel()
    for number in range(1 if num_elements == 0 else -(-MIN_ELEMENTS // num_elements)):
        mean, spread, *rest = case.inputs(dtype, device, number)
        generator = torch.Generator().manual_seed(number)
        grads = [
            as_layout(torch.randn(case.shape, generator=generator).to(device, dtype), case.grad_layout)
            for _ in range(3)
        ]
        for results, function, compute in (
            (actual, noise_inject, dtype),
            (plain, noise_inject_reference, dtype),
            (truth, noise_inject_reference, torch.float64),
        ):
            # `to` keeps the layout, and detach makes a leaf of a view.
            leaves = [x.to(compute).detach().requires_grad_() for x in (mean, spread)]
            with use_backend(backend):
                out = function(*leaves, *rest, spread_is_std=case.spread_is_std)
            upstream = [grad.to(compute) for grad in grads]
            grad_mean, grad_spread = torch.autograd.grad((out.z, out.z_t, out.velocity), leaves, upstream)
            results.add(
                {"z": out.z, "z_t": out.z_t, "velocity": out.velocity}, {"mean": grad_mean, "spread": grad_spread}
            )
            assert out.t.dtype == torch.float32 and not out.t.requires_grad
            if results is actual:
                t = out.t
                assert all(x.is_contiguous() for x in out)
            else:
                assert torch.equal(t, out.t), "t is exact in every backend"
    assert_op_within(actual, plain, truth)


@dataclass(frozen=True)
class CosineCase:
    """One input of cosine_align, [..., N, D]."""

    shape: tuple[int, ...]
    features_layout: str = "contiguous"
    target_layout: str = "contiguous"
    reduction: str = "none"

    def __str__(self) -> str:
        layouts = dict.fromkeys((self.features_layout, self.target_layout))
        return "-".join(["x".join(map(str, self.shape)), *layouts, self.reduction])

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


COSINE_CASES = [
    CosineCase((0, 4, 8)),
    CosineCase((2, 0, 8)),
    CosineCase((1, 1)),
    CosineCase((1, 1, 2)),
    CosineCase((7, 3)),
    CosineCase((1, 5, 31), "transposed"),
    CosineCase((3, 5, 33), "transposed", "transposed"),
    CosineCase((3, 5, 64), "offset", "offset"),
    CosineCase((3, 5, 65), "offset"),
    CosineCase((2, 9, 127), "chunk", "chunk"),
    CosineCase((2, 9, 128), "chunk", "offset"),
    CosineCase((2, 9, 255), "contiguous", "chunk"),
    CosineCase((2, 9, 256)),
    CosineCase((2, 9, 257)),
    CosineCase((2, 3, 4, 48)),
    CosineCase((2, 3, 4, 50), "channels_last", "chunk"),
    CosineCase((4, 16, 384), reduction="sample"),
    CosineCase((4, 16, 768), reduction="mean"),
    CosineCase((4, 16, 768), "offset", "chunk", "mean"),
    CosineCase((2, 16, 1024)),
    CosineCase((2, 17, 1025), "transposed", "offset", "sample"),
    CosineCase((1, 3, 4099)),
    CosineCase((8, 256, 768), "contiguous", "chunk"),
]
FEW_COSINE_CASES = [
    CosineCase((0, 4, 8)),
    CosineCase((130, 3)),
    CosineCase((13, 11, 65), "offset", "transposed"),
    CosineCase((2, 65, 257), "chunk", "offset"),
    CosineCase((3, 43, 768), "contiguous", "chunk"),
    CosineCase((129, 1, 12), reduction="sample"),
]


def check_cosine_align(case: CosineCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Forward and backward of a backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    kept = {"none": case.shape[:-1], "sample": case.shape[:-2], "mean": ()}[case.reduction]
    num_distances = torch.Size(kept).numel()
    for number in range(1 if num_distances == 0 else -(-MIN_DISTANCES // num_distances)):
        inputs = case.inputs(dtype, device, number)
        upstream = None
        for results, function, compute in (
            (actual, cosine_align, dtype),
            (plain, cosine_align_reference, dtype),
            (truth, cosine_align_reference, torch.float64),
        ):
            features, target = (x.to(compute).detach().requires_grad_() for x in inputs)
            with use_backend(backend):
                distance = function(features, target, reduction=case.reduction)
            if upstream is None:
                upstream = torch.randn(distance.shape, generator=torch.Generator().manual_seed(number)).to(device)
            grad_features, grad_target = torch.autograd.grad(
                distance, (features, target), upstream.to(distance.dtype)
            )
            results.add({"distance": distance}, {"features": grad_features, "target": grad_target})
    assert_op_within(actual, plain, truth)
