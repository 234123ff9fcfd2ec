"""The losses of each alignment method against plain float64 versions."""

import pytest
import torch
from torch.testing import assert_close

from sendvae_fast.losses.alignment import alignment_loss, distance_matrix_loss, reals_loss, vf_loss


def test_is_one_minus_the_mean_cosine():
    torch.manual_seed(0)
    features, target = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 5, 8)
    loss = alignment_loss(features, target)
    reference = features.detach().double().requires_grad_()
    expected = 1 - torch.cosine_similarity(reference, target.double(), dim=-1).mean()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    assert_close(features.grad.double(), reference.grad, rtol=1e-5, atol=1e-7)


def test_ends_of_the_range():
    features = torch.randn(2, 4, 6)
    assert_close(alignment_loss(features, 3 * features), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(alignment_loss(features, -features), torch.tensor(2.0), atol=1e-6, rtol=0)


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def plain_vf(features, target, cos_margin, distmat_margin):
    """VA-VAE's two terms patch by patch and pair by pair, as its Section 3 prints them."""
    marginal, matrix = [], []
    for f, y in zip(features, target, strict=True):
        marginal += [torch.relu(1 - cos_margin - cosine(f_n, y_n)) for f_n, y_n in zip(f, y, strict=True)]
        matrix += [
            torch.relu((cosine(f[n], f[m]) - cosine(y[n], y[m])).abs() - distmat_margin)
            for n in range(len(f)) for m in range(len(f))
        ]  # fmt: skip
    return torch.stack(marginal).mean(), torch.stack(matrix).mean()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 3.0), (2.0, 0.0)])
@pytest.mark.parametrize("margins", [(0.5, 0.25), (0.0, 0.0)])
def test_vf_loss_is_va_vaes(margins, weights):
    torch.manual_seed(1)
    features, target = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 6, 5)
    names = ("cos_margin", "distmat_margin", "cos_weight", "distmat_weight")
    loss = vf_loss(features, target, **dict(zip(names, margins + weights, strict=True)))
    reference = features.detach().double().requires_grad_()
    terms = plain_vf(reference, target.double(), *margins)
    expected = weights[0] * terms[0] + weights[1] * terms[1]
    assert min(terms) > 0.02 and loss.dtype == torch.float32 and loss.shape == ()
    assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    loss.backward()
    expected.backward()
    assert_close(features.grad.double(), reference.grad, rtol=1e-5, atol=1e-7)


def test_what_lies_within_the_margins_is_left_alone():
    torch.manual_seed(2)
    target = torch.randn(1, 4, 64)
    features = (target + 0.1 * torch.randn(1, 4, 64)).requires_grad_()
    loss = vf_loss(features, target)
    loss.backward()
    assert loss.item() == 0 and not features.grad.any()
    assert vf_loss(features, target, cos_margin=0.0, distmat_margin=0.0).item() > 0


def test_the_distance_matrix_is_float32_whatever_surrounds_it():
    torch.manual_seed(3)
    features, target = torch.randn(2, 6, 5).bfloat16(), torch.randn(2, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distance_matrix_loss(features, target, 0.25)
    expected = plain_vf(features.double(), target.double(), 0.0, 0.25)[1]
    assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)


def test_reals_loss_is_cosine_at_both_levels():
    torch.manual_seed(4)
    features, target = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 5, 8)
    loss = reals_loss(features, target, patch_weight=0.7, global_weight=0.4)
    reference = features.detach().double().requires_grad_()
    y = target.double()
    patch = sum(1 - cosine(reference[b, n], y[b, n]) for b in range(3) for n in range(5)) / 15
    whole = sum(1 - cosine(reference[b].mean(0), y[b].mean(0)) for b in range(3)) / 3
    expected = 0.7 * patch + 0.4 * whole
    assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    assert_close(features.grad.double(), reference.grad, rtol=1e-5, atol=1e-7)
