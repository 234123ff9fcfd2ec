"""`PatchAlignment` against the mapper and torch's own cosine similarity."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.mappers.mapper_config import MapperConfig
from sendvae_fast.models.mappers.transformer_mapper import Mapper
from sendvae_fast.nn import PatchAlignment

SIZES = dict(latent_channels=4, grid_size=3, target_dim=10)
TINY = dict(width=24, num_heads=3, projector_width=16, patch_size=2)


def make() -> PatchAlignment:
    torch.manual_seed(0)
    return PatchAlignment(**SIZES, **TINY)


def test_it_is_the_mapper_and_one_minus_cosine():
    alignment, mapper = make(), Mapper(MapperConfig(**SIZES, **TINY))
    mapper.load_state_dict(alignment.mapper.state_dict())
    z, target = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 9, 10)
    loss = alignment(z, target)
    expected = (1 - F.cosine_similarity(mapper(z), target, dim=-1)).mean()
    assert_close(loss, expected)
    (gradient,), (true,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, z)
    assert_close(gradient, true)


def test_the_default_sizes_are_the_papers():
    config = PatchAlignment(32, 16, 768).mapper.config
    assert config == MapperConfig(latent_channels=32, grid_size=16, target_dim=768)


def test_training_it_aligns():
    alignment = make()
    z, target = torch.randn(2, 4, 6, 6), torch.randn(2, 9, 10)
    optimizer = torch.optim.AdamW(alignment.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        losses.append(alignment(z, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.8 and losses[-1] < 0.2


@pytest.mark.slow
def test_it_compiles_into_one_graph():
    alignment = make()
    z, target = torch.randn(2, 4, 6, 6), torch.randn(2, 9, 10)
    assert_close(torch.compile(alignment, fullgraph=True, backend="aot_eager")(z, target), alignment(z, target))


def test_what_does_not_fit_is_refused():
    alignment = make()
    with pytest.raises(ValueError, match=r"target must be \[2, 9, 10\].*got \[2, 10, 10\]: leave out class tokens"):
        alignment(torch.randn(2, 4, 6, 6), torch.randn(2, 10, 10))
    with pytest.raises(UserError, match="built for latents of 6 x 6 but got 8 x 8"):
        alignment(torch.randn(2, 4, 8, 8), torch.randn(2, 16, 10))
    with pytest.raises(UserError, match="num_heads=5"):
        PatchAlignment(**SIZES, width=24, num_heads=5)
