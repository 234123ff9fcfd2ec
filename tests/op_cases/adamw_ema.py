from dataclasses import dataclass, field

import torch
from numerics import as_layout

from op_cases.common import DTYPES, Example, OpTests, Results, assert_op_within, num_repeats
from sendvae_fast.ops import adamw_ema_, use_backend

LISTS = ("params", "grads", "exp_avg", "exp_avg_sq", "ema")
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@dataclass
class Arguments:
    """The tensors of one call, in the middle of a training."""

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    exp_avg: list[torch.Tensor]
    exp_avg_sq: list[torch.Tensor]
    ema: list[torch.Tensor] | None
    steps: list[torch.Tensor]
    grad_norm: torch.Tensor | None
    options: dict = field(default_factory=dict)

    def update(self, **options) -> None:
        lists = self.params, self.grads, self.exp_avg, self.exp_avg_sq, self.ema, self.steps
        adamw_ema_(*lists, grad_norm=self.grad_norm, **{**SETTINGS, **self.options, **options})

    def to(self, dtype: torch.dtype) -> "Arguments":
        """A copy with all numbers in `dtype`, but for the steps."""
        lists = [
            tensors and [x.to(dtype, copy=True) for x in tensors] for tensors in (getattr(self, name) for name in LISTS)
        ]
        norm = None if self.grad_norm is None else self.grad_norm.to(dtype)
        return Arguments(*lists, [step.clone() for step in self.steps], norm, self.options)

    def results(self) -> dict[str, torch.Tensor]:
        """What the update changed, each list as one tensor."""
        changed = {name: getattr(self, name) for name in ("params", "exp_avg", "exp_avg_sq", "ema")}
        return {name: torch.cat([x.flatten() for x in tensors]) for name, tensors in changed.items() if tensors}


@dataclass(frozen=True)
class UpdateCase:
    """Shapes of the parameters, and the layouts of the parameters, their gradients and their state."""

    shapes: tuple[tuple[int, ...], ...]
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    state_layout: str = "contiguous"
    ema: bool = True
    norm: float | None = 1.0
    max_grad_norm: float = 0.5
    betas: tuple[float, float] = SETTINGS["betas"]

    def __str__(self) -> str:
        names = ["x".join(map(str, shape)) or "scalar" for shape in self.shapes]
        shown = [*names[:3], f"{len(names)}_tensors"] if len(names) > 4 else names
        layouts = dict.fromkeys((self.layout, self.grad_layout, self.state_layout))
        return "-".join([*shown, *layouts, "ema" if self.ema else "no_ema", f"norm_{self.norm}_{self.max_grad_norm}"])

    def arguments(self, grad_dtype: torch.dtype, device: str, number: int) -> Arguments:
        generator = torch.Generator().manual_seed(6000 + number)

        def draw(layout: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
            tensors = [torch.randn(shape, generator=generator) for shape in self.shapes]
            return [as_layout(x.to(device, dtype), layout) for x in tensors]

        options = {"betas": self.betas, "max_grad_norm": self.max_grad_norm if self.norm is not None else 0.0}
        if self.ema:
            options["ema_decay"] = 0.99
        return Arguments(
            params=draw(self.layout),
            grads=draw(self.grad_layout, grad_dtype),
            exp_avg=[x.mul_(0.3) for x in draw(self.state_layout)],
            exp_avg_sq=[x.square_() for x in draw(self.state_layout)],
            ema=draw(self.layout) if self.ema else None,
            steps=[torch.tensor((i * 7) % 30, device=device) for i in range(len(self.shapes))],
            grad_norm=None if self.norm is None else torch.tensor(self.norm, device=device),
            options=options,
        )


# A chunk has 8192 elements, a table 64 tensors.
CASES = [
    UpdateCase(((0,),)),
    UpdateCase(((),)),
    UpdateCase(((1,),), "offset"),
    UpdateCase(((7,), (), (0, 3), (5, 1, 2)), "offset", "offset", "offset"),
    UpdateCase(((7,), (), (0, 3), (5, 1, 2)), ema=False),
    UpdateCase(((2, 3),), "transposed"),
    UpdateCase(((2, 3), (31, 5)), grad_layout="transposed"),
    UpdateCase(((2, 3), (31, 5)), state_layout="transposed"),
    UpdateCase(((8, 4, 3, 3), (4, 8, 1, 1)), "channels_last", "channels_last", "channels_last"),
    UpdateCase(((8, 4, 3, 3), (6, 5, 2, 3)), "channels_last", "contiguous", "channels_last", ema=False),
    UpdateCase(((8, 4, 3, 3),), "channels_last", "channels_last", "contiguous"),
    UpdateCase(((8, 4, 3, 3),), "contiguous", "channels_last", "contiguous"),
    UpdateCase(((8, 4, 3, 3),), "chunk", "chunk"),
    UpdateCase(((33,), (65,)), norm=None),
    UpdateCase(((33,), (65,)), norm=None, ema=False),
    UpdateCase(((33,), (65,)), max_grad_norm=0.0),
    UpdateCase(((33,), (65,)), max_grad_norm=2.0),
    UpdateCase(((33,), (65,)), norm=0.0),
    UpdateCase(((300,),), betas=(0.0, 0.9)),
    UpdateCase(((300,),), betas=(0.4, 0.0)),
    UpdateCase(((1023,), (1025,)), grad_layout="offset"),
    UpdateCase(((8191,),)),
    UpdateCase(((8192,),)),
    UpdateCase(((8193,),), "offset", "contiguous", "offset", ema=False),
    UpdateCase(((16384,), (0,), (3,))),
    UpdateCase(((0,), (0, 4), (30_003,), (0,))),
    UpdateCase(tuple((n,) for n in range(1, 65))),
    UpdateCase(tuple((n,) for n in range(65)), "offset"),
    UpdateCase(tuple((n % 7, n % 5) for n in range(600)), ema=False),
    UpdateCase(((10_000,), *((5,),) * 100, (20_001,)), state_layout="offset"),
]


def check(case: UpdateCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Two updates of a backend against truth; `dtype` is the gradients'."""
    actual, plain, truth = Results(), Results(), Results()
    for number in range(num_repeats(sum(torch.Size(shape).numel() for shape in case.shapes))):
        arguments = case.arguments(dtype, device, number)
        exact = arguments.to(torch.float64)
        rounded = case.arguments(dtype, device, number)
        for results, these, name in (
            (plain, rounded, "reference"),
            (truth, exact, "reference"),
            (actual, arguments, backend),
        ):
            before = [step.item() for step in these.steps]
            with use_backend(name):
                these.update()
                these.update()
            assert [step.item() for step in these.steps] == [step + 2 for step in before]
            results.add(these.results(), {})
    assert_op_within(actual, plain, truth)


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    case = UpdateCase(((130, 70), (5,), (), (8195,)))
    arguments = case.arguments(dtype, device, number)
    count = len(case.shapes)

    def function(*tensors):
        """Clones, so that repeated calls find the same values."""
        lists = [[x.clone() for x in tensors[i * count :][:count]] for i in range(len(LISTS) + 1)]
        Arguments(*lists, tensors[-1], arguments.options).update()
        return tuple(x for part in (0, 2, 3, 4, 5) for x in lists[part])

    lists = (getattr(arguments, name) for name in (*LISTS, "steps"))
    return Example(function, (*(x for tensors in lists for x in tensors), arguments.grad_norm))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    calls = []
    for ema, norm, dtype in ((True, 1.0, DTYPES[0]), (False, None, DTYPES[1])):
        case = UpdateCase(((4, 3), (), (0,)), ema=ema, norm=norm)
        these = case.arguments(dtype, device, 0)
        calls.append(
            (
                "adamw_ema",
                (
                    these.params,
                    these.grads,
                    these.exp_avg,
                    these.exp_avg_sq,
                    these.ema or [],
                    these.steps,
                    these.grad_norm,
                    1e-3,
                    0.9,
                    0.99,
                    1e-8,
                    0.1,
                    0.99 if ema else 0.0,
                    0.5 if norm else 0.0,
                ),
            )
        )
    return calls


TESTS = OpTests("adamw_ema", CASES, [], check, example, raw_calls)
