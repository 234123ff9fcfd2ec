from dataclasses import dataclass

import torch
from numerics import as_layout

from op_cases.common import Example, OpTests, Results, assert_op_within, num_repeats
from sendvae_fast.ops import philox, sde_step, sde_step_reference, use_backend

SCALE = 1.8  # not a float32


@dataclass(frozen=True)
class StepCase:
    """One input of sde_step."""

    shape: tuple[int, int, int, int]
    velocity_layout: str = "contiguous"
    x_layout: str = "contiguous"
    state: torch.dtype = torch.float64
    guided: bool = False
    last: bool = False

    def __str__(self) -> str:
        layouts = dict.fromkeys((self.velocity_layout, self.x_layout))
        flags = ["guided"] * self.guided + ["last"] * self.last
        return "-".join(["x".join(map(str, self.shape)), *layouts, str(self.state), *flags])

    @property
    def options(self) -> dict:
        return dict(guidance_scale=SCALE if self.guided else None, last=self.last)

    def inputs(self, dtype: torch.dtype, device: str, number: int) -> tuple[torch.Tensor, ...]:
        """x, velocity, times, key, sample_ids; `dtype` is the velocity's."""
        generator = torch.Generator().manual_seed(3000 + number)
        batch = self.shape[0]
        x = torch.randn(self.shape, generator=generator, dtype=self.state)
        velocity = torch.randn((2 * batch if self.guided else batch, *self.shape[1:]), generator=generator)
        t = torch.rand((), generator=generator, dtype=torch.float64)
        return (
            as_layout(x.to(device), self.x_layout),
            as_layout(velocity.to(device, dtype), self.velocity_layout),
            torch.stack((t, t - 0.04)).clamp(min=0).to(device),
            philox.make_key(7, number, device),
            torch.randint(2**62, (batch,), generator=generator).to(device),
        )


CASES = [
    StepCase((0, 4, 8, 8)),
    StepCase((0, 4, 8, 8), guided=True),
    StepCase((1, 1, 1, 1)),
    StepCase((1, 1, 1, 1), guided=True, last=True),
    StepCase((3, 1, 1, 2), state=torch.float32),
    StepCase((2, 5, 1, 1), guided=True),
    StepCase((5, 3, 5, 7)),
    StepCase((1, 3, 5, 7), "transposed", "transposed", guided=True),
    StepCase((2, 7, 1, 13), "chunk", "channels_last", last=True),
    StepCase((2, 7, 13, 1), "channels_last", "chunk", guided=True),
    StepCase((4, 4, 8, 8), "chunk", "chunk"),
    StepCase((4, 4, 8, 8), "chunk", "chunk", torch.float32, guided=True, last=True),
    StepCase((3, 8, 9, 6), "channels_last", guided=True),
    StepCase((3, 8, 9, 6), "channels_last_chunk", "channels_last", torch.float32, guided=True),
    StepCase((3, 6, 4, 5), "offset", "offset"),
    StepCase((2, 16, 15, 17), "offset", "chunk", guided=True),
    StepCase((2, 16, 16, 16), "channels_last_chunk", "offset", last=True),
    StepCase((1, 4, 16, 16)),  # exactly one tile of the CPU
    StepCase((1, 1, 25, 41)),  # one element more
    StepCase((1, 33, 31, 3), "channels_last", state=torch.float32),
    StepCase((2, 32, 16, 16), "channels_last", guided=True, last=True),
    StepCase((70, 4, 3, 3), "channels_last", guided=True),
    StepCase((16, 32, 16, 16), "channels_last", guided=True),
]


def check(case: StepCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """A backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    for number in range(num_repeats(torch.Size(case.shape).numel())):
        x, velocity, *rest = case.inputs(dtype, device, number)
        with use_backend(backend):
            out = sde_step(x, velocity, *rest, **case.options)
        assert out.x.dtype == x.dtype and out.network_input.dtype == dtype
        assert out.x.is_contiguous() and out.network_input.is_contiguous()
        assert torch.equal(out.network_input, out.x.to(dtype))
        other = sde_step_reference(x, velocity, *rest, **case.options)
        true = sde_step_reference(x.double(), velocity.double(), *rest, **case.options)
        for results, step in ((actual, out), (plain, other), (truth, true)):
            results.add(step._asdict(), {})
    assert_op_within(actual, plain, truth)


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    def function(x, velocity, *rest):
        # What a compiler may fuse and lay out as it likes.
        return tuple(sde_step(x * 1.0, velocity * 1.0, *rest, guidance_scale=SCALE))

    return Example(function, StepCase((4, 8, 9, 7), "channels_last", guided=True).inputs(dtype, device, number))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    calls = []
    for state in (torch.float64, torch.float32):
        for guided in (False, True):
            case = StepCase((2, 4, 3, 5), "channels_last", state=state, guided=guided, last=not guided)
            calls.append(("sde_step", (*case.inputs(torch.bfloat16, device, 0), *case.options.values())))
    return calls


TESTS = OpTests("sde_step", CASES, [], check, example, raw_calls)
