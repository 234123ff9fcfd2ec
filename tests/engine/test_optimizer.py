import pytest
import torch

from sendvae_fast.engine.optimizer import AdamWEMA
from sendvae_fast.engine.settings import OptimizerConfig
from sendvae_fast.errors import UserError

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in [(3, 4), (5,), (1, 1, 2), (0,), ()]
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_adamw_and_an_ema_by_hand(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = AdamWEMA(ours, **SETTINGS, ema_decay=0.9)
    reference = torch.optim.AdamW(theirs, **SETTINGS, foreach=True)
    ema = [param.detach().double().clone() for param in theirs]
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
        ema = [0.9 * average + 0.1 * param.detach().double() for average, param in zip(ema, theirs, strict=True)]
    for mine, other, average in zip(ours, theirs, ema, strict=True):
        # 1e-6 relative in fp32 and 1e-14 in fp64: rounding of 20 steps.
        tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
        torch.testing.assert_close(mine, other, **tolerance)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[mine][key], reference.state[other][key], **tolerance)
        torch.testing.assert_close(optimizer.state[mine]["ema"].double(), average, **tolerance)
        assert optimizer.state[mine]["step"] == 20


def test_parameters_without_gradient_and_zero_steps_are_left_alone():
    params = parameters(torch.float32)
    before = [param.detach().clone() for param in params]
    optimizer = AdamWEMA(params, **SETTINGS, ema_decay=0.9)
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    assert moved == [False, True, False, False, False]


def test_parameters_may_start_at_different_steps():
    """Bias correction goes by each parameter's own count."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer, reference = AdamWEMA(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(4):
        for params, opt in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, step)
            if step < 2:
                params[0].grad = None
            opt.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.7])
def test_measures_clips_and_skips_over_all_groups(max_grad_norm):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer = AdamWEMA([{"params": ours[:2]}, {"params": ours[2:]}], **SETTINGS, max_grad_norm=max_grad_norm)
    reference = torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(3):
        for params in (ours, theirs):
            set_gradients(params, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm or float("inf"))
        optimizer.step()
        reference.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-14, atol=0)
    before = [param.detach().clone() for param in ours]
    ours[3].grad, ours[4].grad = None, torch.full_like(ours[4], torch.nan)
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    for mine, other, old in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-14)
        assert torch.equal(mine, old) and optimizer.state[mine]["step"] == 3


def test_no_ema_without_decay():
    params = parameters(torch.float32)
    optimizer = AdamWEMA(params, **SETTINGS)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.state_keys == ("exp_avg", "exp_avg_sq")
    assert "ema" not in optimizer.state[params[0]]


def test_ema_starts_as_the_parameter():
    params = parameters(torch.float32)
    optimizer = AdamWEMA(params, **SETTINGS, ema_decay=0.5)
    optimizer.init_state(params)
    assert all(torch.equal(optimizer.state[param]["ema"], param) for param in params)
    assert optimizer.state[params[0]]["ema"].data_ptr() != params[0].data_ptr()


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"max_grad_norm": -1.0},
        {"ema_decay": 0.0},
        {"ema_decay": 1.0},
    ],
)
def test_config_names_what_is_wrong(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)
