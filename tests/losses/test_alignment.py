"""The alignment loss against torch's cosine similarity."""

import torch
from torch.testing import assert_close

from sendvae_fast.losses.alignment import alignment_loss


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
