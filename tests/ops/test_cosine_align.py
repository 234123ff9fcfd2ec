import math

import pytest
import torch
from op_cases.common import require_backend
from op_cases.cosine_align import CosineCase

from sendvae_fast.ops import cosine_align, cosine_align_reference, use_backend

BACKENDS = ("reference", "cpu", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend("cosine_align", request.param)
    with use_backend(request.param):
        yield request.param


def make_inputs(shape=(3, 5, 48), dtype=torch.float32):
    return [x.requires_grad_() for x in CosineCase(shape).inputs(dtype, "cpu", 0)]


def test_reference_is_torch_cosine_similarity():
    features, target = (x.double() for x in make_inputs())
    expected = 1 - torch.nn.functional.cosine_similarity(features, target, dim=-1)
    torch.testing.assert_close(cosine_align_reference(features, target, reduction="none"), expected)
    torch.testing.assert_close(cosine_align_reference(features, target, reduction="sample"), expected.mean(1))
    torch.testing.assert_close(cosine_align_reference(features, target), expected.mean())


def test_known_angles(backend):
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([[3.0, 0.0], [0.0, 5.0], [-7.0, 0.0], [0.0, 2.0]])
    expected = torch.tensor([0.0, 1.0, 2.0, 1 - math.sqrt(0.5)])
    torch.testing.assert_close(cosine_align(features, target, reduction="none"), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("margin", [None, 0.5])
def test_the_mean_is_that_of_the_distances(backend, margin):
    """Its gradient is theirs, each given the same part of it: to the bit."""
    features, target = make_inputs((7, 43, 20))
    distance = cosine_align(features, target, reduction="none", margin=margin)
    mean = cosine_align(features, target, margin=margin)
    assert mean.shape == () and mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), distance.double().mean(), rtol=2e-7, atol=0)
    upstream = torch.tensor(0.7)
    grads = torch.autograd.grad(mean, (features, target), upstream)
    of_rows = torch.autograd.grad(distance, (features, target), (upstream / 301).expand(7, 43))
    assert all(torch.equal(one, other) for one, other in zip(grads, of_rows, strict=True))


def test_the_mean_of_no_rows_is_nan(backend):
    features, target = make_inputs((2, 0, 8))
    mean = cosine_align(features, target)
    assert mean.isnan() and torch.autograd.grad(mean, features)[0].shape == (2, 0, 8)


@pytest.mark.parametrize("margin", [None, 0.5])
@pytest.mark.parametrize("reduction", ["none", "sample", "mean"])
def test_reference_gradcheck(reduction, margin):
    features, target = (x.detach().double().requires_grad_() for x in make_inputs((2, 3, 5)))
    within = cosine_align(features, target, reduction="none") <= 0.5
    assert within.any() and not within.all(), "both sides of the margin"
    assert torch.autograd.gradcheck(
        lambda f, y: cosine_align(f, y, reduction=reduction, margin=margin), (features, target)
    )


def test_margin_is_va_vaes(backend):
    """relu(1 - margin - cos), by torch's own cosine; gradients 0 within the margin, unchanged beyond it."""
    features, target = make_inputs((40, 5))
    cosine = torch.nn.functional.cosine_similarity(features, target, dim=-1)
    beyond = (cosine < 0.5)[:, None]
    assert beyond.any() and not beyond.all()
    distance = cosine_align(features, target, reduction="none", margin=0.5)
    torch.testing.assert_close(distance, torch.relu(0.5 - cosine), rtol=0, atol=1e-6)
    grads = torch.autograd.grad(distance.sum(), (features, target))
    plain = torch.autograd.grad(cosine_align(features, target, reduction="none").sum(), (features, target))
    for one, other in zip(grads, plain, strict=True):
        assert torch.equal(one, torch.where(beyond, other, 0.0))


def test_at_the_margin_the_gradient_is_zero(backend):
    """Orthogonal patches are exactly at a margin of 1; the numbers just above and below 1 are the two sides of it."""
    features = torch.tensor([[2.0, 0.0]], requires_grad=True)
    target = torch.tensor([[0.0, 1.0]])
    for margin, expected in ((1.0, 0.0), (1.0 + 2**-23, 0.0), (1.0 - 2**-24, -0.5)):
        (grad,) = torch.autograd.grad(cosine_align(features, target, margin=margin), features)
        assert grad.tolist() == [[0.0, expected]], margin


def test_without_a_margin_there_is_no_lower_bound(backend):
    """Rounding takes the distance of some parallel rows below 0: there margin=None and margin=0 part."""
    features = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    free, bounded = (cosine_align(features, features, reduction="none", margin=margin) for margin in (None, 0.0))
    assert (free < 0).any() and torch.equal(bounded, free.clamp_min(0.0))


def test_norms_below_eps_count_as_eps(backend):
    eps = 0.5
    features = torch.tensor([[0.1, 0.2], [0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    target = torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.1, 0.0]], requires_grad=True)
    distance = cosine_align(features, target, reduction="none", eps=eps)
    dots = [0.1 * 3 + 0.2 * 4, 0.0, 0.3]
    expected = torch.tensor([1 - dots[0] / (eps * 5), 1.0, 1 - dots[2] / (5 * eps)])
    torch.testing.assert_close(distance, expected)
    grads = torch.autograd.grad(distance.sum(), (features, target))
    f, y = (x.detach().double().requires_grad_() for x in (features, target))
    truth = torch.autograd.grad(cosine_align_reference(f, y, reduction="none", eps=eps).sum(), (f, y))
    for one, other in zip(grads, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)


def test_zero_rows_are_finite(backend):
    features, target = torch.zeros(2, 7, requires_grad=True), torch.zeros(2, 7, requires_grad=True)
    distance = cosine_align(features, target)
    assert distance.item() == 1.0
    assert all(x.isfinite().all() for x in torch.autograd.grad(distance, (features, target)))


def test_shape_and_dtype_of_the_reductions(backend):
    features, target = make_inputs((2, 3, 4, 8), torch.bfloat16)
    for reduction, shape in (("none", (2, 3, 4)), ("sample", (2, 3)), ("mean", ())):
        distance = cosine_align(features, target, reduction=reduction)
        assert distance.shape == shape and distance.dtype == torch.float32


def test_target_gets_a_gradient_only_if_it_asks(backend):
    features, target = make_inputs()
    both = torch.autograd.grad(cosine_align(features, target), (features, target))
    frozen = target.detach()
    (alone,) = torch.autograd.grad(cosine_align(features, frozen), features)
    assert torch.equal(both[0], alone) and frozen.grad is None
    (other,) = torch.autograd.grad(cosine_align(features.detach(), target), target)
    torch.testing.assert_close(other, both[1], rtol=0, atol=0)


def test_mixed_dtypes_are_promoted(backend):
    features, target = make_inputs()
    half = features.detach().bfloat16().requires_grad_()
    distance = cosine_align(half, target)
    torch.testing.assert_close(distance, cosine_align(half.float(), target))
    (grad,) = torch.autograd.grad(distance, half)
    assert grad.dtype == torch.bfloat16


def test_nan_goes_through(backend):
    features, target = make_inputs((3, 9))
    with torch.no_grad():
        features[1, 2] = math.nan
    distance = cosine_align(features, target, reduction="none")
    assert distance.isnan().tolist() == [False, True, False]
    within = cosine_align(features, target, reduction="none", margin=3.0)
    assert within.isnan().tolist() == [False, True, False]
    assert torch.autograd.grad(within.sum(), features, retain_graph=True)[0][1].isnan().all()
    grads = torch.autograd.grad(distance.sum(), (features, target))
    assert all(grad[1].isnan().all() and grad[[0, 2]].isfinite().all() for grad in grads)


def test_rows_do_not_depend_on_the_batch(backend):
    features, target = make_inputs((6, 300))
    whole = cosine_align(features, target, reduction="none")
    order = torch.tensor([5, 0, 2])
    assert torch.equal(whole[order], cosine_align(features[order], target[order], reduction="none"))


@pytest.mark.parametrize(
    ("features", "target", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(3), {}, "features"),
        (torch.zeros(3, 0), torch.zeros(3, 0), {}, "features"),
        (torch.zeros(3, 4), torch.zeros(3, 5), {}, "one shape"),
        (torch.zeros(3, 4), torch.zeros(3, 4, device="meta"), {}, "one device"),
        (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64), {}, "target"),
        (torch.zeros(3, 4), torch.zeros(3, 4), dict(reduction="sum"), "reduction"),
        (torch.zeros(3, 4), torch.zeros(3, 4), dict(eps=0.0), "eps"),
        (torch.zeros(3, 4), torch.zeros(3, 4), dict(margin=math.nan), "margin"),
    ],
)
def test_bad_input_is_named(features, target, options, message):
    with pytest.raises(ValueError, match=message):
        cosine_align(features, target, **options)
