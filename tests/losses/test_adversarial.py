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


def last_layer(nll_scale, g_scale):
    """A last layer with two losses on its output: (weight, x_hat, its input, nll, g_loss)."""
    generator = torch.Generator().manual_seed(0)
    last_input = torch.randn(2, 5, 6, 7, generator=generator)
    weight = torch.randn(3, 5, 3, 3, generator=generator, requires_grad=True)
    x_hat = torch.nn.functional.conv2d(last_input, weight, padding=1)
    return weight, x_hat, last_input, nll_scale * x_hat.square().mean(), g_scale * x_hat.sin().mean()


def gradients_of_x_hat(x_hat, *losses):
    return [torch.autograd.grad(loss, x_hat, retain_graph=True)[0] for loss in losses]


@pytest.mark.parametrize(("nll_scale", "g_scale"), [(6.0, 2.0), (0.0, 1.0), (1e-3, 0.5)])
def test_adaptive_weight_is_the_ratio_of_the_last_layers_gradient_norms(nll_scale, g_scale):
    weight, x_hat, last_input, nll, g_loss = last_layer(nll_scale, g_scale)
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (nll, g_loss)]
    adaptive = adaptive_weight(*gradients_of_x_hat(x_hat, nll, g_loss), last_input)
    assert adaptive.item() == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-5)
    assert not adaptive.requires_grad and weight.grad is None


def test_adaptive_weight_is_clamped():
    _, x_hat, last_input, nll, g_loss = last_layer(1e9, 1e-9)
    assert adaptive_weight(*gradients_of_x_hat(x_hat, nll, g_loss), last_input).item() == 1e4
