"""A loss with a gradient from elsewhere is one that autograd would have differentiated itself."""

import torch

from sendvae_fast.losses.known_gradient import with_known_gradient


def test_equals_the_loss_whose_gradient_it_was_given():
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    expected_value = (x @ weight).sin().sum() + weight.square().sum()
    (expected,) = torch.autograd.grad(3 * expected_value, weight)

    output = x @ weight
    leaf = output.detach().requires_grad_()
    value = leaf.sin().sum()
    loss = with_known_gradient(value, output, torch.autograd.grad(value, leaf)[0]) + weight.square().sum()
    assert loss.item() == expected_value.item()
    (3 * loss).backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-14, atol=0)
    assert leaf.grad is None
