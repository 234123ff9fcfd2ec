"""Taps against gradients of real backward passes, and the adaptive weight against its formula."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sendvae_fast.losses.adaptive import Tap, adaptive_weight


def two_layers():
    """A network whose output is an alias, as an engine's would be: (first, last, its input, its output)."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Conv2d(4, 3, 1)
    taps = Tap(first), Tap(last)
    output = last(first(torch.randn(2, 2, 6, 7)).tanh())
    return first, last, taps, output.view_as(output)


def test_gradients_from_tap_to_tap_are_those_of_a_backward_pass():
    first, last, (first_tap, last_tap), output = two_layers()
    output.register_hook(lambda gradient: pytest.fail("a hook on the output ran"))
    alias = output.view_as(output)
    loss = alias.square().sum()
    seed = torch.autograd.grad(loss, alias, retain_graph=True)[0]
    at_last = last_tap.weight_gradient(seed)
    at_first = first_tap.weight_gradient(first_tap.gradient(last_tap, seed))
    output._backward_hooks.clear()
    loss.backward()  # the graphs are still there
    assert_close(at_last, last.weight.grad)
    assert_close(at_first, first.weight.grad)


@pytest.mark.parametrize(("base", "own"), [(6.0, 2.0), (0.0, 1.0), (1e-3, 1e-4)])
def test_the_weight_is_the_ratio_of_norms(base, own):
    direction = torch.randn(3, 5, requires_grad=True) * 1.0
    direction = direction / direction.norm()
    weight = adaptive_weight(base * direction, own * direction, limit=1e4)
    assert weight.item() == pytest.approx(base / (own + 1e-4), rel=1e-5)
    assert not weight.requires_grad


def test_the_weight_is_clamped():
    assert adaptive_weight(torch.tensor([1e9]), torch.tensor([1e-9]), limit=1e4).item() == 1e4
