"""The mapper: published sizes and a version assembled from timm's parts."""

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.mappers.mapper_config import MapperConfig
from sendvae_fast.models.mappers.transformer_mapper import Mapper
from sendvae_fast.models.positions import sincos_2d

TINY = dict(latent_channels=4, grid_size=4, target_dim=10, width=24, num_heads=3, projector_width=16)


def tiny(**changes) -> Mapper:
    torch.manual_seed(0)
    return Mapper(MapperConfig(**{**TINY, **changes}))


@pytest.mark.parametrize(
    "sizes, parameters",
    [
        (dict(latent_channels=32, target_dim=768), 14_458_112),
        (dict(latent_channels=32, target_dim=1024), 14_982_656),
        (dict(latent_channels=32, target_dim=1024, width=1024, num_heads=16), 21_023_744),
        (dict(latent_channels=4, target_dim=768, patch_size=2), 14_445_824),
        (dict(latent_channels=32, target_dim=768, depth=0), 14_458_112 - 7_087_872),
        (dict(latent_channels=32, target_dim=768, depth=2), 14_458_112 + 7_087_872),
    ],
)
def test_has_the_published_size(sizes, parameters):
    with torch.device("meta"):
        mapper = Mapper(MapperConfig(grid_size=16, **sizes))
        patch_size, channels = mapper.config.patch_size, mapper.config.latent_channels
        features = mapper(torch.empty(1, channels, 16 * patch_size, 16 * patch_size))
    assert sum(parameter.numel() for parameter in mapper.parameters()) == parameters
    assert features.shape == (1, 256, sizes["target_dim"])
    assert not [key for key in mapper.state_dict() if "pos_embed" in key]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_equals_timm_parts_on_the_same_weights(depth, patch_size):
    mapper = tiny(depth=depth, patch_size=patch_size).double()
    state = mapper.state_dict()
    embed = timm.layers.PatchEmbed(4 * patch_size, patch_size, 4, 24)
    # Epsilon 1e-5, torch's default; timm's own LayerNorm class has 1e-6.
    blocks = nn.Sequential(*(Block(24, 3, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth)))
    with torch.no_grad():
        for parameter in mapper.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for part, prefix in ((embed, "patch_embed."), (blocks, "blocks.")):
        part.double().load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    z = torch.randn(2, 4, 4 * patch_size, 4 * patch_size, dtype=torch.float64)
    h = blocks(embed(z) + sincos_2d(24, 4).double())
    for index in (0, 2, 4):
        h = h @ state[f"projector.{index}.weight"].T + state[f"projector.{index}.bias"]
        h = h * torch.sigmoid(h) if index < 4 else h
    assert_close(mapper(z), h)


def test_positions_are_those_of_mae():
    """Each entry written out: first half the column, second half the row, sines before cosines."""
    width, grid = 12, 5
    embedding = sincos_2d(width, grid)
    assert embedding.shape == (25, 12) and embedding.dtype == torch.float32
    for row in range(grid):
        for column in range(grid):
            for i in range(3):
                frequency = 10000 ** (-i / 3)
                entry = embedding[row * grid + column].double()
                for offset, coordinate in ((0, column), (6, row)):
                    angle = torch.tensor(coordinate * frequency, dtype=torch.float64)
                    assert_close(entry[offset + i], angle.sin(), rtol=1e-6, atol=1e-7)
                    assert_close(entry[offset + 3 + i], angle.cos(), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(6, 2)


def test_is_initialised_like_repa():
    mapper = tiny(width=384, num_heads=6, patch_size=2)
    for module in mapper.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert module.bias.eq(0).all() and 0.9 * bound < module.weight.abs().max() <= bound
    bound = (6 / (4 * 2 * 2 + 384)) ** 0.5  # the patch embedding as a linear layer on flattened patches
    assert 0.9 * bound < mapper.patch_embed.proj.weight.abs().max() <= bound
    assert mapper.patch_embed.proj.bias.eq(0).all()


def test_overfits_and_trains_every_weight():
    mapper = tiny()
    z, target = torch.randn(2, 4, 4, 4), torch.randn(2, 16, 10)
    optimizer = torch.optim.Adam(mapper.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = 1 - torch.cosine_similarity(mapper(z), target, dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in mapper.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_another_latent_size_and_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="4 x 4 but got 8 x 8"):
        tiny()(torch.zeros(1, 4, 8, 8))
    for sizes in (dict(num_heads=5), dict(width=18, num_heads=3), dict(depth=-1), dict(grid_size=0)):
        with pytest.raises(UserError):
            tiny(**sizes)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_takes_flattened_patches(patch_size):
    mapper = tiny(patch_size=patch_size).double()
    z = torch.randn(2, 4, 4 * patch_size, 4 * patch_size, dtype=torch.float64)
    patches = torch.nn.functional.unfold(z, patch_size, stride=patch_size).mT
    assert_close(mapper(patches), mapper(z), rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match=f"of 16 x {4 * patch_size**2} but got 15 x"):
        mapper(patches[:, 1:])
