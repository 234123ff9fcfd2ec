"""The losses of stage 2's velocity: against torch, and finite where half precision ends."""

import pytest
import torch
from torch.testing import assert_close

from sendvae_fast.losses.alignment import alignment_loss
from sendvae_fast.losses.velocity import velocity_direction_loss, velocity_loss
from sendvae_fast.ops import use_backend


def test_are_torchs_mean_square_and_cosine_over_channels():
    generator = torch.Generator().manual_seed(0)
    velocity = torch.randn(2, 5, 3, 4, generator=generator, requires_grad=True)
    target = torch.randn(2, 5, 3, 4, generator=generator)
    truth = velocity.detach().double().requires_grad_()
    expected = (truth - target).square().mean() + (1 - torch.cosine_similarity(truth, target.double(), dim=1)).mean()
    loss = velocity_loss(velocity, target) + velocity_direction_loss(velocity, target)
    assert loss.dtype == torch.float32
    assert_close(loss, expected.float())
    loss.backward()
    expected.backward()
    assert_close(velocity.grad, truth.grad.float())


def test_the_direction_does_not_see_the_length():
    velocity, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    assert_close(velocity_direction_loss(100 * velocity, target), velocity_direction_loss(velocity, target))
    assert velocity_direction_loss(3 * target, target).abs() < 1e-6
    assert_close(velocity_direction_loss(-target, target), torch.tensor(2.0))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("extreme", [1e30, -1e30, 0.0, 1e-4, 1e-30, 1e-38])
@pytest.mark.parametrize("share", ["all", "one token", "one element"])
def test_gradients_stay_finite_at_the_ends_of_bfloat16(backend, extreme, share):
    """What a network in bf16 may give late in a long run, where sums of squares in half precision are inf or 0."""
    generator = torch.Generator().manual_seed(0)
    features, velocity = (torch.randn(2, 16, 4, 4, generator=generator).bfloat16() for _ in range(2))
    where = {"all": ..., "one token": (1, slice(None), 2, 3), "one element": (1, 7, 2, 3)}[share]
    for tensor in (features, velocity):
        tensor[where] = extreme
        tensor.requires_grad_()
    target, wanted = (torch.randn(2, 16, 4, 4, generator=generator).bfloat16() for _ in range(2))
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        align = alignment_loss(features.flatten(2).mT, target.flatten(2).mT)
        direction = velocity_direction_loss(velocity, wanted)
        loss = velocity_loss(velocity, wanted) + direction + 0.5 * align
    loss.backward()
    assert align.isfinite() and direction.isfinite() and not loss.isnan()
    assert features.grad.isfinite().all() and velocity.grad.isfinite().all()
