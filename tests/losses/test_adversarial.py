"""Hinge losses against closed forms."""

import torch

from sendvae_fast.losses.adversarial import generator_loss, hinge_discriminator_loss


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
