"""Hinge losses and VQGAN's adaptive weight against closed forms."""

import pytest
import torch

from sendvae_fast.losses.adversarial import adaptive_weight, generator_loss, hinge_discriminator_loss


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert hinge_discriminator_loss(real, fake).item() == 0.5 * (0.25 + 0.5)
    assert generator_loss(fake).item() == 1.0
    assert hinge_discriminator_loss(real.half(), fake.half()).dtype == torch.float32
    assert generator_loss(fake.half()).dtype == torch.float32


def test_hinge_gives_no_gradient_beyond_the_margin():
    real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-2.0, 0.0], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25] and fake.grad.tolist() == [0.0, 0.25]


@pytest.mark.parametrize(
    "nll_slope, g_slope, expected",
    [(6.0, 2.0, 6 / 2.0001), (0.0, 1.0, 0.0), (3.0, 0.0, 1e4), (1e9, 1.0, 1e4)],
)
def test_adaptive_weight_is_the_ratio_of_gradient_norms(nll_slope, g_slope, expected):
    layer = torch.ones(4, requires_grad=True)  # gradient norm 2 |slope / 2|
    nll, g_loss = nll_slope / 2 * layer.sum(), -g_slope / 2 * layer.sum()
    weight = adaptive_weight(nll, g_loss, layer)
    assert weight.item() == pytest.approx(expected, rel=1e-6)
    assert not weight.requires_grad and layer.grad is None
    (nll + weight * g_loss).backward()  # the graphs are still there
    assert torch.isfinite(layer.grad).all()
