from dataclasses import dataclass

import torch
from numerics import as_layout

from op_cases.common import Example, OpTests, Results, assert_op_within, num_repeats
from sendvae_fast.ops import noise_inject, noise_inject_reference, philox, use_backend


@dataclass(frozen=True)
class NoiseCase:
    """One input of noise_inject. The name in a test's id is `str(case)`."""

    shape: tuple[int, int, int, int]
    mean_layout: str = "contiguous"
    spread_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    spread_is_std: bool = False
    given_t: bool = False
    patch_size: int | None = None

    def __str__(self) -> str:
        layouts = dict.fromkeys((self.mean_layout, self.spread_layout, self.grad_layout))
        flags = ["std"] * self.spread_is_std + ["given_t"] * self.given_t
        flags += [f"patch{self.patch_size}"] * (self.patch_size is not None)
        return "-".join(["x".join(map(str, self.shape)), *layouts, *flags])

    @property
    def z_t_shape(self) -> tuple[int, ...]:
        if self.patch_size is None:
            return self.shape
        batch, channels, height, width = self.shape
        return batch, height * width // self.patch_size**2, channels * self.patch_size**2

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


CASES = [
    NoiseCase((0, 4, 8, 8)),
    NoiseCase((0, 4, 8, 8), "chunk", "chunk"),
    NoiseCase((1, 1, 1, 1)),
    NoiseCase((43, 1, 1, 1), spread_is_std=True),
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
    NoiseCase((0, 4, 8, 8), patch_size=2),
    NoiseCase((43, 1, 1, 1), patch_size=1),
    NoiseCase((3, 5, 1, 7), patch_size=1),
    NoiseCase((2, 3, 9, 6), "chunk", "chunk", "transposed", patch_size=3),
    NoiseCase((2, 2, 6, 10), "channels_last", "offset", "offset", patch_size=2, spread_is_std=True),
    NoiseCase((2, 5, 12, 8), "chunk", "chunk", patch_size=4, given_t=True),
    NoiseCase((1, 3, 5, 5), patch_size=5),  # one token
    NoiseCase((3, 7, 34, 38), "offset", "transposed", "chunk", patch_size=2),  # tiles that begin inside a row
    NoiseCase((4, 4, 32, 32), "chunk", "chunk", patch_size=2),
    NoiseCase((4, 32, 16, 16), "chunk", "chunk", patch_size=1),
    NoiseCase((1, 32, 16, 16), patch_size=1),  # four of CUDA's tiles
    NoiseCase((1, 6, 24, 16), "chunk", "chunk", patch_size=2),  # the last tile is not full
]
FEW_CASES = [
    NoiseCase((0, 4, 8, 8)),
    NoiseCase((1, 1, 25, 41)),
    NoiseCase((5, 3, 5, 7), "chunk", "chunk", "transposed"),
    NoiseCase((3, 8, 9, 6), "channels_last_chunk", "channels_last_chunk", "channels_last"),
    NoiseCase((3, 6, 4, 5), "offset", "transposed", "offset", spread_is_std=True),
    NoiseCase((2, 16, 15, 17), "offset", "chunk", "channels_last", given_t=True),
    NoiseCase((0, 4, 8, 8), patch_size=2),
    NoiseCase((1, 3, 34, 38), "chunk", "chunk", "transposed", patch_size=2),
    NoiseCase((2, 5, 6, 9), "offset", "transposed", "chunk", patch_size=3, spread_is_std=True),
    NoiseCase((3, 8, 9, 6), "channels_last", "chunk", patch_size=1, given_t=True),
]


MIN_DRAWS = 512
"""The largest errors are those of rare draws. Among fewer plain PyTorch's may be missing, and an op's one be there."""
TOKEN_LAYOUTS = {"channels_last": "transposed", "channels_last_chunk": "chunk"}  # of 3 dimensions


def check(case: NoiseCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Forward and backward of a backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    num_elements = torch.Size(case.shape).numel()
    for number in range(num_repeats(num_elements, MIN_DRAWS)):
        mean, spread, *rest = case.inputs(dtype, device, number)
        generator = torch.Generator().manual_seed(number)
        grads = []
        for shape in (case.shape, case.z_t_shape, case.shape):
            grad = torch.randn(shape, generator=generator).to(device, dtype)
            layout = case.grad_layout if grad.dim() == 4 else TOKEN_LAYOUTS.get(case.grad_layout, case.grad_layout)
            grads.append(as_layout(grad, layout))
        for results, function, compute in (
            (actual, noise_inject, dtype),
            (plain, noise_inject_reference, dtype),
            (truth, noise_inject_reference, torch.float64),
        ):
            # `to` keeps the layout, and detach makes a leaf of a view.
            leaves = [x.to(compute).detach().requires_grad_() for x in (mean, spread)]
            with use_backend(backend):
                out = function(*leaves, *rest, spread_is_std=case.spread_is_std, patch_size=case.patch_size)
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


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    mean, spread, *rest = NoiseCase((4, 8, 9, 6)).inputs(dtype, device, number)

    def function(moments, *rest):
        # A chunk of something that a compiler may fuse and lay out as it likes.
        mean, spread = (moments * 1.0).chunk(2, dim=1)
        planes, tokens = (noise_inject(mean, spread, *rest, patch_size=patch_size) for patch_size in (None, 3))
        return *planes, tokens.z_t

    moments = torch.cat((mean, spread), dim=1).requires_grad_()
    return Example(function, (moments, *rest[:-1]))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    mean, spread, *rest, _ = NoiseCase((2, 4, 6, 4)).inputs(torch.float32, device, 0)
    _, latent_std, key, ids = rest
    leaves, t = (mean.requires_grad_(), spread.requires_grad_()), torch.rand(2, device=device)
    grads = [torch.randn_like(mean) for _ in range(3)]
    token_grads = grads[0], grads[1].view(2, 6, 16), grads[2]
    return [
        *(
            ("noise_inject", (*leaves, *rest, given, is_std, None, True, True))
            for given, is_std in ((None, False), (t, True))
        ),
        ("noise_inject_backward", (*grads, spread.detach(), latent_std, key, ids, t, False, None)),
        ("noise_inject", (*leaves, *rest, None, False, 2, True, True)),
        ("noise_inject", (*leaves, *rest, None, False, None, False, True)),
        ("noise_inject", (*leaves, *rest, None, False, 2, True, False)),
        ("noise_inject_backward", (*token_grads, spread.detach(), latent_std, key, ids, t, False, 2)),
    ]


TESTS = OpTests("noise_inject", CASES, FEW_CASES, check, example, raw_calls)
