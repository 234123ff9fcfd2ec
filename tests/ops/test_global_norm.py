"""What is true of global_norm alone. Its matrix of shapes and what holds for every op are in test_contract.py."""

import math

import pytest
import torch
from op_cases.common import require_backend
from op_cases.global_norm import NormCase

from sendvae_fast.ops import global_norm, global_norm_reference, use_backend
from sendvae_fast.ops.registration import op_of


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    require_backend("global_norm", request.param)
    with use_backend(request.param):
        yield request.param


def test_reference_gradcheck():
    inputs = [x.double().requires_grad_() for x in NormCase(((3, 2), (), (4,))).inputs(torch.float32, "cpu", 0)]
    assert torch.autograd.gradcheck(lambda *x: global_norm_reference(x), inputs)


def test_is_the_norm_of_pytorch():
    tensors = NormCase(((300, 7), (), (0,), (65_000,))).inputs(torch.float32, "cpu", 0)
    expected = torch.nn.utils.get_total_norm([x.double() for x in tensors])
    torch.testing.assert_close(global_norm_reference([x.double() for x in tensors]), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [1e-44, 1e-30, 1e19, 1e30, 1e38])
def test_squares_beyond_float32_are_no_trouble(backend, value):
    """The norm of four equal numbers is twice one of them, however large or small."""
    x = torch.full((2,), value)
    assert global_norm([x, x]) == 2 * x[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [((3e38, 3e38), math.inf), ((1.0, math.inf), math.inf), ((-math.inf, 1.0), math.inf), ((1.0, math.nan), math.nan),
     ((math.inf, math.nan), math.nan)],
)  # fmt: skip
def test_is_not_finite_when_the_step_must_be_skipped(backend, values, expected):
    tensors = [torch.ones(40_000), *(torch.tensor([value]) for value in values), torch.ones(3)]
    norm = global_norm(tensors)
    torch.testing.assert_close(norm, torch.tensor(expected), equal_nan=True)


def test_sum_is_as_exact_as_float64(backend):
    """A million ones beside a large number: an fp32 sum would lose every one of them."""
    tensors = [torch.full((1,), 1e6), torch.ones(1_000_000), torch.full((1,), 1e6)]
    assert global_norm(tensors).item() == pytest.approx(math.sqrt(2e12 + 1e6), rel=2**-24)


def test_no_tensors():
    assert global_norm([]) == 0.0


def test_needs_no_gradient(backend):
    assert not global_norm([torch.ones(3, requires_grad=True)]).requires_grad


def test_wrong_arguments():
    for tensors, match in (
        ([torch.ones(2, dtype=torch.int64)], "must be float32"),
        ([torch.ones(2), torch.ones(2).bfloat16()], "of one dtype"),
        ([torch.ones(2), torch.ones(2, device="meta")], "on one device"),
    ):
        with pytest.raises(ValueError, match=match):
            global_norm(tensors)


def test_the_raw_op_refuses_what_it_cannot_read():
    require_backend("global_norm", "cpu")
    op = op_of("global_norm", "cpu")
    for tensors, match in (
        ([torch.ones(2), torch.ones(2).bfloat16()], "must be Float, got BFloat16"),
        ([torch.ones(2).double()], "must be Float, BFloat16 or Half"),
        ([torch.ones(2, 3).mT], "must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op(tensors)
