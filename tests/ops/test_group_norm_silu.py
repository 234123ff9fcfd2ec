import math

import pytest
import torch
import torch.nn.functional as F
from op_cases.common import require_backend
from op_cases.group_norm_silu import GroupNormCase

from sendvae_fast.ops import group_norm_silu, group_norm_silu_reference, use_backend

BACKENDS = ("reference", "cpu", "triton")
RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend("group_norm_silu", request.param)
    with use_backend(request.param):
        yield request.param


def make_inputs(shape=(2, 6, 5, 4), num_groups=3, dtype=torch.float32):
    """x, residual, weight, bias, all requiring gradients."""
    case = GroupNormCase(shape, num_groups, residual_layout="channels_last")
    return [x.requires_grad_() for x in case.inputs(dtype, "cpu", 0)]


def test_reference_is_torch_group_norm_and_silu():
    x, residual, weight, bias = (tensor.double() for tensor in make_inputs())
    normalised = F.group_norm(x, 3, weight, bias, 1e-3)
    torch.testing.assert_close(group_norm_silu_reference(x, weight, bias, 3, 1e-3), F.silu(normalised))
    torch.testing.assert_close(group_norm_silu_reference(x, weight, bias, 3, 1e-3, silu=False), normalised)
    y, s = group_norm_silu_reference(x, weight, bias, 3, residual=residual)
    assert torch.equal(s, x + residual)
    torch.testing.assert_close(y, F.silu(F.group_norm(s, 3, weight, bias, 1e-6)))


@pytest.mark.parametrize("silu", [False, True])
@RESIDUAL
def test_reference_gradcheck(with_residual, silu):
    x, residual, weight, bias = (tensor.detach().double().requires_grad_() for tensor in make_inputs((2, 4, 2, 3), 2))

    def function(x, residual, weight, bias):
        return group_norm_silu(x, weight, bias, 2, 1e-3, residual=residual if with_residual else None, silu=silu)

    assert torch.autograd.gradcheck(function, (x, residual, weight, bias))


def test_known_values(backend):
    """Two groups of two channels: -1 and 1 around a mean of 3, and four times 2."""
    x = torch.tensor([2.0, 4.0, 2.0, 2.0]).view(1, 4, 1, 1)
    weight, bias = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 0.5, -0.5])
    z = torch.tensor([-1.0, 3.0, 0.5, -0.5])
    norm = group_norm_silu(x, weight, bias, 2, 1e-12, silu=False)
    torch.testing.assert_close(norm.flatten(), z, rtol=1e-6, atol=0)
    y = group_norm_silu(x, weight, bias, 2, 1e-12)
    torch.testing.assert_close(y.flatten(), z / (1 + torch.exp(-z)), rtol=1e-6, atol=0)


def test_eps_is_added_to_the_variance(backend):
    x = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    y = group_norm_silu(x, torch.ones(2), torch.zeros(2), 1, 3.0, silu=False)
    torch.testing.assert_close(y.flatten(), torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("z", [-1e4, -200.0, -87.0, 87.0, 200.0, 1e4])
def test_far_ends_of_silu(backend, z):
    """y is z or 0 there, its slope 1 or 0: no overflow, no NaN."""
    x = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
    weight, bias = torch.zeros(2, requires_grad=True), torch.full((2,), z, requires_grad=True)
    y = group_norm_silu(x, weight, bias, 1)
    torch.testing.assert_close(y.flatten(), bias.detach().clamp_min(0), rtol=1e-6, atol=1e-30)
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    torch.testing.assert_close(grads[2], torch.full((2,), float(z > 0)), rtol=1e-6, atol=1e-30)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("outlier", [0.0, 1e4])
def test_large_mean(backend, outlier):
    """The error is that of rounding the mean and the inputs to float32, whatever the mean and however a map begins."""
    if backend == "reference":
        pytest.skip("PyTorch's own group_norm is less accurate")
    mean = 1e4
    generator = torch.Generator().manual_seed(0)
    x = (mean + torch.randn((2, 8, 64, 64), generator=generator)).to(memory_format=torch.channels_last)
    x[:, :, 0] += outlier
    y = group_norm_silu(x, torch.ones(8), torch.zeros(8), 2, silu=False)
    truth = group_norm_silu_reference(x.double(), torch.ones(8), torch.zeros(8), 2, silu=False)
    std = x.double().reshape(2, 2, -1).std(2).min().item()
    eps = torch.finfo(torch.float32).eps
    bound = eps * mean / std + 8 * eps * truth.abs().max().item()
    assert (y.double() - truth).abs().max().item() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_is_channels_last_in_the_input_dtype(backend, dtype):
    x, residual, weight, bias = make_inputs(dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        y, s = group_norm_silu(x.contiguous(memory_format=layout), weight, bias, 3, residual=residual)
        for tensor in (y, s):
            assert tensor.dtype == dtype and tensor.is_contiguous(memory_format=torch.channels_last)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype(backend, dtype):
    """On a GPU torch's own group_norm goes to float32 under autocast."""
    x, residual, weight, bias = make_inputs(dtype=dtype)
    expected = group_norm_silu(x, weight, bias, 3, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        actual = group_norm_silu(x, weight, bias, 3, residual=residual)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype and torch.equal(one, other)
    grads = torch.autograd.grad(actual[0].float().sum(), (x, residual, weight, bias))
    assert [grad.dtype for grad in grads] == [dtype, dtype, torch.float32, torch.float32]


def test_weights_may_have_the_dtype_of_the_input(backend):
    x, _, weight, bias = make_inputs(dtype=torch.bfloat16)
    weight, bias = (tensor.detach().bfloat16().requires_grad_() for tensor in (weight, bias))
    y = group_norm_silu(x, weight, bias, 3)
    assert torch.equal(y, group_norm_silu(x, weight.float(), bias.float(), 3))
    assert [grad.dtype for grad in torch.autograd.grad(y.sum(), (weight, bias))] == [torch.bfloat16] * 2


def test_residual_is_rounded_before_it_is_normalised(backend):
    x, residual, weight, bias = make_inputs(dtype=torch.bfloat16)
    y, s = group_norm_silu(x, weight, bias, 3, residual=residual)
    if backend == "triton":  # whose interpreter rounds to bfloat16 towards zero
        torch.testing.assert_close(s, x + residual, rtol=2**-7, atol=0)
    else:
        assert torch.equal(s, x + residual)
    assert torch.equal(y, group_norm_silu(s, weight, bias, 3))


def test_gradients_of_the_sum_join(backend):
    """Only y, only s, or both used: each gradient is that of the two parts."""
    x, residual, weight, bias = make_inputs()
    y, s = group_norm_silu(x, weight, bias, 3, residual=residual)
    generator = torch.Generator().manual_seed(1)
    grad_y, grad_s = (torch.randn(y.shape, generator=generator) for _ in range(2))
    leaves = (x, residual)
    from_y = torch.autograd.grad(y, leaves, grad_y, retain_graph=True)
    from_s = torch.autograd.grad(s, leaves, grad_s, retain_graph=True)
    from_both = torch.autograd.grad((y, s), leaves, (grad_y, grad_s))
    assert all(torch.equal(grad, grad_s) for grad in from_s)
    for one, two, both in zip(from_y, from_s, from_both, strict=True):
        torch.testing.assert_close(both, one + two)


def test_nan_stays_in_its_group(backend):
    x, _, weight, bias = make_inputs()
    with torch.no_grad():
        x[1, 2, 3, 1] = math.nan
    y = group_norm_silu(x, weight, bias, 3)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[1, 2:4] = True
    assert torch.equal(y.isnan(), expected)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert torch.equal(grad_x.isnan(), expected)
    for grad in (grad_weight, grad_bias):
        assert grad.isnan().tolist() == [False, False, True, True, False, False]


def test_infinity_makes_its_group_nan(backend):
    x, _, weight, bias = make_inputs()
    with torch.no_grad():
        x[0, 5, 0, 0] = math.inf
    y = group_norm_silu(x, weight, bias, 3)
    assert y[0, 4:].isnan().all() and y[0, :4].isfinite().all() and y[1].isfinite().all()


def test_samples_do_not_depend_on_the_batch(backend):
    x, _, weight, bias = make_inputs((6, 12, 20, 20), 4)
    if backend == "reference":
        pytest.skip("PyTorch's own group_norm promises no such thing")
    whole = group_norm_silu(x, weight, bias, 4)
    order = torch.tensor([5, 0, 2])
    assert torch.equal(whole[order], group_norm_silu(x[order], weight, bias, 4))


X, WEIGHT = torch.zeros(2, 4, 3, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(4, 3, 3)), "x must be"),
        (dict(x=torch.zeros(2, 4, 0, 3)), "x must be"),
        (dict(x=torch.zeros(2, 4, 3, 3, dtype=torch.int64)), "x must be float32"),
        (dict(num_groups=3), "num_groups"),
        (dict(num_groups=0), "num_groups"),
        (dict(weight=torch.ones(5)), "weight"),
        (dict(bias=torch.ones(4, 1)), "bias"),
        (dict(weight=torch.ones(4, dtype=torch.float16)), "weight must be float32"),
        (dict(bias=torch.ones(4, device="meta")), "bias is on meta"),
        (dict(residual=torch.zeros(2, 4, 3, 4)), "residual"),
        (dict(residual=torch.zeros(2, 4, 3, 3).bfloat16()), "residual"),
        (dict(residual=torch.zeros(2, 4, 3, 3, device="meta")), "residual is on meta"),
        (dict(eps=0.0), "eps"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = dict(x=X, weight=WEIGHT, bias=WEIGHT, num_groups=2) | changes
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments)
