import math

import lpips
import pytest
import torch
from op_cases.common import require_backend
from op_cases.lpips_distance import LpipsCase

from sendvae_fast.ops import lpips_distance, lpips_distance_reference, use_backend

BACKENDS = ("reference", "cpu", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend("lpips_distance", request.param)
    with use_backend(request.param):
        yield request.param


def make_inputs(shape=(3, 5, 4, 6), dtype=torch.float32, layout="contiguous"):
    f0, f1, weight = LpipsCase(shape, layout, layout).inputs(dtype, "cpu", 0)
    return f0.requires_grad_(), f1.requires_grad_(), weight


def test_reference_is_the_packages_arithmetic():
    f0, f1, weight = (x.detach().double() for x in make_inputs())
    difference = (lpips.normalize_tensor(f0) - lpips.normalize_tensor(f1)) ** 2
    expected = lpips.spatial_average(torch.nn.functional.conv2d(difference, weight.reshape(1, -1, 1, 1))).flatten()
    torch.testing.assert_close(lpips_distance_reference(f0, f1, weight), expected)


def test_known_values(backend):
    f0 = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).T.reshape(1, 2, 1, 2)  # pixels (3, 4) and (0, 2)
    f1 = torch.tensor([[5.0, 0.0], [0.0, 7.0]]).T.reshape(1, 2, 1, 2)  # the second is a multiple
    weight = torch.tensor([2.0, 0.5])
    expected = torch.tensor([(2 * 0.4**2 + 0.5 * 0.8**2) / 2])
    torch.testing.assert_close(lpips_distance(f0, f1, weight), expected, rtol=1e-6, atol=0)


def test_reference_gradcheck():
    f0, f1, weight = (x.detach().double() for x in make_inputs((2, 3, 2, 2)))
    leaves = f0.requires_grad_(), f1.requires_grad_()
    assert torch.autograd.gradcheck(lambda f0, f1: lpips_distance(f0, f1, weight), leaves)


def test_equal_features_have_no_distance_and_no_gradient(backend):
    f0, _, weight = make_inputs()
    f1 = f0.detach().clone().requires_grad_()
    distance = lpips_distance(f0, f1, weight)
    assert distance.eq(0).all()
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(distance.sum(), (f0, f1)))


def test_dead_pixels_are_finite(backend):
    """All channels 0, as after a ReLU; the lpips package has a NaN gradient there."""
    f0, f1, weight = make_inputs()
    with torch.no_grad():
        f0[0, :, 1, 2], f1[1, :, 0, 0] = 0, 0
        f0[2, :, 3, 3], f1[2, :, 3, 3] = 0, 0
    distance = lpips_distance(f0, f1, weight)
    grads = torch.autograd.grad(distance.sum(), (f0, f1))
    assert distance.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    leaves = [x.detach().double().requires_grad_() for x in (f0, f1)]
    truth = torch.autograd.grad(lpips_distance_reference(*leaves, weight).sum(), leaves)
    for grad, true in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_the_gradients_that_are_asked_for_and_in_the_layout_of_the_features(backend, layout):
    f0, f1, weight = make_inputs(layout=layout)
    both = torch.autograd.grad(lpips_distance(f0, f1, weight).sum(), (f0, f1))
    (first,) = torch.autograd.grad(lpips_distance(f0, f1.detach(), weight).sum(), f0)
    (second,) = torch.autograd.grad(lpips_distance(f0.detach(), f1, weight.requires_grad_()).sum(), f1)
    assert torch.equal(first, both[0]) and torch.equal(second, both[1])
    assert not lpips_distance(f0.detach(), f1.detach(), weight).requires_grad
    if backend != "reference":
        assert all(grad.stride() == f0.stride() for grad in both)


def test_mixed_dtypes_are_promoted(backend):
    f0, f1, weight = make_inputs()
    half = f1.detach().bfloat16().requires_grad_()
    distance = lpips_distance(f0, half, weight)
    torch.testing.assert_close(distance, lpips_distance(f0, half.float(), weight))
    assert torch.autograd.grad(distance.sum(), half)[0].dtype == torch.bfloat16


def test_nan_goes_through(backend):
    f0, f1, weight = make_inputs()
    with torch.no_grad():
        f1[1, 2, 3, 4] = math.nan
    distance = lpips_distance(f0, f1, weight)
    assert distance.isnan().tolist() == [False, True, False]
    pixel = torch.zeros(f0.shape, dtype=torch.bool)
    pixel[1, :, 3, 4] = True
    for grad in torch.autograd.grad(distance[[0, 2]].sum() + distance[1], (f0, f1)):
        assert torch.equal(grad.isnan(), pixel)


def test_samples_do_not_depend_on_the_batch(backend):
    f0, f1, weight = make_inputs((4, 33, 9, 31))
    whole = lpips_distance(f0, f1, weight)
    order = torch.tensor([3, 1])
    assert torch.equal(whole[order], lpips_distance(f0[order], f1[order], weight))


@pytest.mark.parametrize(
    ("f0", "f1", "weight", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(3), "f0 must be"),
        (torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, 4), torch.zeros(3), "f0 must be"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5), torch.zeros(3), "one shape"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(4), "weight must be"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.zeros(3), "f1 must be float32"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(3, device="meta"), "one device"),
    ],
)
def test_bad_input_is_named(f0, f1, weight, message):
    with pytest.raises(ValueError, match=message):
        lpips_distance(f0, f1, weight)
