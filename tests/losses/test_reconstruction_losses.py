"""Reconstruction and KL losses against closed forms."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from sendvae_fast.evaluation.reconstruction_quality import psnr
from sendvae_fast.losses.reconstruction import kl_loss, mean_psnr, reconstruction_loss
from sendvae_fast.models.pixels import to_model_range


@pytest.mark.parametrize("kind, value", [("l1", 0.75), ("l2", 0.625)])
def test_reconstruction_is_the_mean_difference(kind, value):
    x, x_hat = torch.zeros(1, 1, 1, 2), torch.tensor([0.5, -1.0]).reshape(1, 1, 1, 2)
    assert reconstruction_loss(x, x_hat, kind).item() == value
    loss = reconstruction_loss(x.bfloat16(), x_hat.bfloat16(), kind)
    assert loss.dtype == torch.float32 and loss.item() == value


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="l1 or l2"):
        reconstruction_loss(torch.zeros(1), torch.zeros(1), "mse")


def test_kl_is_that_of_torch_distributions():
    """Summed over latent elements, averaged over the batch."""
    torch.manual_seed(0)
    mean, logvar = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    posterior = Normal(mean.double(), torch.exp(0.5 * logvar.double()))
    expected = kl_divergence(posterior, Normal(torch.zeros(()).double(), 1.0)).sum((1, 2, 3)).mean()
    assert_close(kl_loss(torch.cat([mean, logvar], 1)).double(), expected, rtol=1e-6, atol=0)
    assert kl_loss(torch.zeros(2, 8, 3, 3)) == 0


def test_kl_clamps_the_log_variance():
    moments = torch.tensor([0.0, 100.0]).reshape(1, 2, 1, 1).requires_grad_()
    loss = kl_loss(moments)
    assert_close(loss.item(), 0.5 * (torch.tensor(20.0).double().exp().item() - 1 - 20), rtol=1e-6, atol=0)
    loss.backward()
    assert moments.grad[0, 1] == 0
    assert_close(kl_loss(torch.tensor([0.0, -100.0]).reshape(1, 2, 1, 1)).item(), 0.5 * 29.0)


def test_losses_have_the_right_gradients():
    torch.manual_seed(0)
    x, x_hat = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    reconstruction_loss(x, x_hat, "l2").backward()
    assert_close(x_hat.grad, 2 * (x_hat - x).detach() / x.numel())
    moments = torch.randn(2, 4, 3, 3, requires_grad=True)
    kl_loss(moments).backward()
    mean, logvar = moments.detach().chunk(2, 1)
    assert_close(moments.grad, torch.cat([mean, 0.5 * (logvar.exp() - 1)], 1) / 2)


def test_psnr_is_that_of_the_evaluation():
    torch.manual_seed(0)
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    noisy = (images + 40 * torch.randn(images.shape)).round().clamp(0, 255).byte()
    expected = psnr(images, noisy).mean()
    # Beyond the range of pictures counts as its end.
    x_hat = torch.where(noisy == 255, 3.0, to_model_range(noisy))
    assert_close(mean_psnr(to_model_range(images), x_hat).double(), expected, rtol=1e-5, atol=0)


def test_psnr_of_the_same_picture_is_capped():
    assert mean_psnr(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)).item() == 100.0
