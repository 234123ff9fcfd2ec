"""What is true of adamw_ema_ alone. Its matrix of shapes and what holds for every op are in test_contract.py."""

import copy

import pytest
import torch
from op_cases.adamw_ema import LISTS, SETTINGS, UpdateCase
from op_cases.common import require_backend
from torch._subclasses.fake_tensor import FakeTensorMode

from sendvae_fast.ops import adamw_ema_, available_backends, use_backend
from sendvae_fast.ops.registration import op_of

CASE = UpdateCase(((70, 130), (5,), (), (0,)))


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    require_backend("adamw_ema", request.param)
    with use_backend(request.param):
        yield request.param


def test_channels_last_parameters_are_updated_in_place(monkeypatch):
    """By the compiled op, without the copies and temporaries of the reference."""
    require_backend("adamw_ema", "cpu")
    monkeypatch.setattr("sendvae_fast.ops.adamw_ema.adamw_ema_reference_", None)
    case = UpdateCase(((8, 4, 3, 3), (5,)))
    expected, arguments = (case.arguments(torch.float32, "cpu", 0) for _ in range(2))
    for name in LISTS:
        tensors = getattr(arguments, name)
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    with use_backend("cpu"):
        expected.update()
        arguments.update()
    for x, y in zip(all_tensors(arguments), all_tensors(expected), strict=True):
        assert torch.equal(x, y)


def all_tensors(arguments) -> list[torch.Tensor]:
    return [x for name in (*LISTS, "steps") for x in getattr(arguments, name) or []]


def test_reference_is_clip_adamw_and_ema_of_pytorch():
    """Ten steps in fp64 against the library's own parts, clipped at some steps and not at others."""
    arguments = CASE.arguments(torch.float32, "cpu", 0).to(torch.float64)
    for moments in (arguments.exp_avg, arguments.exp_avg_sq):
        torch._foreach_zero_(moments)
    torch._foreach_zero_(arguments.steps)
    theirs = [param.clone().requires_grad_() for param in arguments.params]
    ema = copy.deepcopy(arguments.ema)
    optimizer = torch.optim.AdamW(theirs, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    clipped = set()
    for step in range(10):
        for param in theirs:
            param.grad = torch.randn(param.shape, dtype=torch.float64, generator=generator) * 0.5**step
        arguments.grads = [param.grad.clone() for param in theirs]
        arguments.grad_norm = torch.nn.utils.clip_grad_norm_(theirs, 3.0)
        clipped.add(bool(arguments.grad_norm > 3.0))
        arguments.update(max_grad_norm=3.0)
        optimizer.step()
        for average, param in zip(ema, theirs, strict=True):
            average.mul_(0.99).add_(param.detach(), alpha=0.01)
    assert clipped == {True, False}
    exact = {"rtol": 1e-14, "atol": 1e-15}
    for i, param in enumerate(theirs):
        state = optimizer.state[param]
        torch.testing.assert_close(arguments.params[i], param.detach(), **exact)
        torch.testing.assert_close(arguments.exp_avg[i], state["exp_avg"], **exact)
        torch.testing.assert_close(arguments.exp_avg_sq[i], state["exp_avg_sq"], **exact)
        torch.testing.assert_close(arguments.ema[i], ema[i], **exact)
        assert arguments.steps[i] == state["step"] == 10


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_norm_that_is_not_finite_skips_everything(backend, norm):
    arguments = CASE.arguments(torch.float32, "cpu", 0)
    arguments.grads[1][2] = norm
    arguments.grad_norm.fill_(norm)
    before = [x.clone() for x in all_tensors(arguments)]
    arguments.update()
    for x, y in zip(all_tensors(arguments), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_where_it_is(backend):
    """Without a norm nothing is skipped, and each element goes its own way."""
    arguments = CASE.arguments(torch.float32, "cpu", 0)
    arguments.grads[0][3, 4] = float("nan")
    arguments.ema[1][0] = float("nan")
    arguments.grad_norm = None
    arguments.update(max_grad_norm=0.0)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert getattr(arguments, name)[0].isnan().nonzero().tolist() == [[3, 4]]
        assert not getattr(arguments, name)[1].isnan().any()
    assert arguments.ema[1].isnan().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(("step", "beta"), [(0, 1 - 1e-6), (10**6, 1 - 1e-6), (2**40, 0.999)])
def test_bias_correction_is_exact_at_any_step(backend, step, beta):
    """1 - beta^k is 1e-6 at the first step: in fp32 it would be wrong by 3%."""
    param, grad = torch.zeros(1), torch.ones(1)
    m, v = torch.full((1,), 0.25), torch.full((1,), 0.5)
    steps = [torch.tensor(step)]
    adamw_ema_([param], [grad], [m], [v], None, steps, lr=1.0, betas=(beta, beta), eps=1e-8)
    m_true, v_true = 0.25 + (1 - beta) * 0.75, 0.5 * beta + 1 - beta
    correction = 1 - beta ** (step + 1)
    expected = -m_true / correction / (v_true / correction) ** 0.5
    assert param.item() == pytest.approx(expected, rel=4 * torch.finfo(torch.float32).eps)
    assert steps[0] == step + 1


def test_a_moment_without_memory_is_the_gradient(backend):
    """Exactly, though the moment before was 1e8 times larger: what m + (g - m) rounds to is 0."""
    m = [torch.full((3,), 1e8)]
    adamw_ema_(
        [torch.zeros(3)],
        [torch.ones(3)],
        m,
        [torch.ones(3)],
        None,
        [torch.tensor(0)],
        lr=1.0,
        betas=(0.0, 0.9),
        eps=1e-8,
    )
    assert m[0].tolist() == [1.0, 1.0, 1.0]


def test_parameters_may_require_a_gradient_and_autograd_sees_the_change(backend):
    arguments = UpdateCase(((4,),)).arguments(torch.float32, "cpu", 0)
    param = arguments.params[0].requires_grad_()
    loss = param.square().sum()
    arguments.update()
    assert param.grad_fn is None and param.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_tensors_do_nothing(backend):
    adamw_ema_([], [], [], [], [], [], **SETTINGS, ema_decay=0.9)
    adamw_ema_([], [], [], [], None, [], **SETTINGS)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_host_reads_nothing_from_the_device(name):
    """Fake tensors have no values: an `.item()` or a branch on one would raise."""
    require_backend("adamw_ema", name)
    with FakeTensorMode() as mode, use_backend(name):
        arguments = CASE.arguments(torch.float32, "cpu", 0)
        adamw_ema_(
            *([mode.from_tensor(torch.empty(x.shape)) for x in arguments.params] for _ in range(5)),
            [mode.from_tensor(torch.tensor(0)) for _ in arguments.params],
            **SETTINGS,
            ema_decay=0.9,
            grad_norm=mode.from_tensor(torch.tensor(1.0)),
            max_grad_norm=1.0,
        )


def test_wrong_arguments():
    def call(**changes):
        arguments = CASE.arguments(torch.float32, "cpu", 0)
        options = {name: changes.pop(name) for name in ("max_grad_norm", "ema_decay") if name in changes}
        for name, value in changes.items():
            setattr(arguments, name, value(getattr(arguments, name)))
        arguments.update(**options)

    for match, changes in (
        ("grads must have 4 tensors", {"grads": lambda x: x[1:]}),
        ("steps must have 4 tensors", {"steps": lambda x: x[1:]}),
        ("ema must have 4 tensors for 4 params, got 0", {"ema": lambda x: None}),
        ("ema must have 0 tensors", {"ema_decay": None}),
        ("max_grad_norm 0.5 needs grad_norm", {"grad_norm": lambda x: None}),
        ("grad_norm must be torch.float32", {"grad_norm": lambda x: x.double()}),
        ("grad_norm must be torch.float32", {"grad_norm": lambda x: x[None]}),
        ("params must be float32 or float64", {"params": lambda x: [y.half() for y in x]}),
        ("params must be torch.float32", {"params": lambda x: [*x[:-1], x[-1].double()]}),
        ("grads of torch.float32 params", {"grads": lambda x: [y.double() for y in x]}),
        ("grads must be torch.float32", {"grads": lambda x: [*x[:-1], x[-1].bfloat16()]}),
        ("exp_avg must be torch.float32 \\[70, 130\\]", {"exp_avg": lambda x: [x[0].mT, *x[1:]]}),
        ("exp_avg_sq must be .* on cpu here, got .* on meta", {"exp_avg_sq": lambda x: [y.to("meta") for y in x]}),
        ("steps must be torch.int64", {"steps": lambda x: [y.float() for y in x]}),
    ):
        with pytest.raises(ValueError, match=match):
            call(**changes)
    call()


def test_the_raw_op_refuses_what_would_read_out_of_bounds():
    require_backend("adamw_ema", "cpu")
    op = op_of("adamw_ema", "cpu")
    assert available_backends("adamw_ema")["triton"] == "adamw_ema has no triton backend"

    def call(**changes):
        these = CASE.arguments(torch.float32, "cpu", 0)
        for name, value in changes.items():
            setattr(these, name, value(getattr(these, name)))
        op(
            these.params,
            these.grads,
            these.exp_avg,
            these.exp_avg_sq,
            these.ema,
            these.steps,
            these.grad_norm,
            1e-3,
            0.9,
            0.99,
            1e-8,
            0.1,
            0.99,
            0.5,
        )

    for match, changes in (
        ("grads has 3 tensors, not 4", {"grads": lambda x: x[1:]}),
        ("exp_avg has 3 tensors", {"exp_avg": lambda x: x[1:]}),
        ("ema has 3 tensors", {"ema": lambda x: x[1:]}),
        ("steps has 3 tensors", {"steps": lambda x: x[1:]}),
        ("exp_avg_sq has 5 elements, not 9100", {"exp_avg_sq": lambda x: [x[1], *x[1:]]}),
        ("params must be contiguous", {"params": lambda x: [x[0].mT, *x[1:]]}),
        ("steps must be Long", {"steps": lambda x: [y.int() for y in x]}),
        ("steps must have shape", {"steps": lambda x: [y[None] for y in x]}),
        ("grad_norm must be Float", {"grad_norm": lambda x: x.double()}),
        ("clipping needs grad_norm", {"grad_norm": lambda x: None}),
        ("grads must be Float", {"grads": lambda x: [y.double() for y in x]}),
    ):
        with pytest.raises(RuntimeError, match=match):
            call(**changes)
    call()
