from dataclasses import dataclass

import torch
from numerics import as_layout

from op_cases.common import DTYPES, MIN_ELEMENTS, Example, OpTests, Results, assert_op_within
from sendvae_fast.ops import global_norm, global_norm_reference, use_backend


@dataclass(frozen=True)
class NormCase:
    """A list of tensors."""

    shapes: tuple[tuple[int, ...], ...]
    layout: str = "contiguous"
    scale: float = 1.0

    def __str__(self) -> str:
        names = ["x".join(map(str, shape)) or "scalar" for shape in self.shapes]
        shown = [*names[:3], f"{len(names)}_tensors"] if len(names) > 4 else names
        return "-".join([*shown, self.layout, f"{self.scale:g}"])

    def inputs(self, dtype: torch.dtype, device: str, number: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(4000 + number)
        tensors = [torch.randn(shape, generator=generator) * self.scale for shape in self.shapes]
        return [as_layout(x.to(device, dtype), self.layout) for x in tensors]


# A chunk has 32768 elements, a table 128 tensors.
CASES = [
    NormCase(((0,),)),
    NormCase(((),)),
    NormCase(((1,),), "offset"),
    NormCase(((2, 3),), "transposed"),
    NormCase(((7,), (), (0, 3), (5, 1, 2)), "offset"),
    NormCase(((31,), (33, 3))),
    NormCase(((4, 8, 3, 3),), "channels_last"),
    NormCase(((4, 8, 3, 3), (6, 4, 1, 1)), "chunk"),
    NormCase(((1023,), (1025,)), "offset"),
    NormCase(((32767,),)),
    NormCase(((32768,),)),
    NormCase(((32769,),), "offset"),
    NormCase(((65536,), (0,), (3,))),
    NormCase(((0,), (0, 4), (100_003,), (0,))),
    NormCase(((300, 301), (64, 1024)), "transposed"),
    NormCase(tuple((n,) for n in range(1, 129))),
    NormCase(tuple((n,) for n in range(129)), "offset"),
    NormCase(tuple((n % 7, n % 5) for n in range(300))),
    NormCase(((40_000,), *((5,),) * 200, (70_001,))),
    NormCase(((1000,), (77,)), scale=1e-4),
    NormCase(((1000,), (77,)), scale=1e3),
]


def check(case: NormCase, dtype: torch.dtype, backend: str, device: str) -> None:
    actual, plain, truth = Results(), Results(), Results()
    for number in range(MIN_ELEMENTS if sum(map(torch.Size.numel, map(torch.Size, case.shapes))) < 10_000 else 3):
        tensors = case.inputs(dtype, device, number)
        with use_backend(backend):
            actual.add({"norm": global_norm(tensors)}, {})
        plain.add({"norm": global_norm_reference(tensors)}, {})
        truth.add({"norm": global_norm_reference([x.double() for x in tensors])}, {})
    assert_op_within(actual, plain, truth)


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    def function(*tensors):
        return (global_norm([x * 1.0 for x in tensors]),)

    return Example(function, tuple(NormCase(((400, 301), (5,), (), (70_001,))).inputs(dtype, device, number)))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    return [("global_norm", (NormCase(((4, 3), (), (0,))).inputs(dtype, device, 0),)) for dtype in DTYPES]


TESTS = OpTests("global_norm", CASES, [], check, example, raw_calls)
