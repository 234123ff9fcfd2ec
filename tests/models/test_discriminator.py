"""PatchGAN: published size, a plain functional version, and independence of the batch with group norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.discriminator import Discriminator, load_discriminator_weights
from sendvae_fast.models.discriminator_config import DiscriminatorConfig


def test_has_the_published_size_and_layout():
    with torch.device("meta"):
        discriminator = Discriminator(DiscriminatorConfig())
        logits = discriminator(torch.empty(1, 3, 256, 256))
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    assert logits.shape == (1, 1, 30, 30)
    weights = {k: tuple(v.shape) for k, v in discriminator.state_dict().items() if v.ndim == 4}
    assert weights == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }


def test_equals_a_plain_version():
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(base_channels=4)).double()
    state = discriminator.state_dict()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    h = F.leaky_relu(F.conv2d(x, state["main.0.weight"], state["main.0.bias"], 2, 1), 0.2)
    for index, stride in ((2, 2), (5, 2), (8, 1)):
        h = F.conv2d(h, state[f"main.{index}.weight"], None, stride, 1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = (state[f"main.{index + 1}.{name}"].reshape(1, -1, 1, 1) for name in ("weight", "bias"))
        h = F.leaky_relu((h - mean) / (var + 1e-5).sqrt() * scale + shift, 0.2)
    assert_close(discriminator(x), F.conv2d(h, state["main.11.weight"], state["main.11.bias"], 1, 1))


@pytest.mark.parametrize("norm, independent", [("group", True), ("batch", False)])
def test_only_group_norm_is_independent_of_how_the_batch_is_split(norm, independent):
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(base_channels=8, num_layers=2, norm=norm))
    x = torch.randn(4, 3, 32, 32)
    together, apart = discriminator(x), torch.cat([discriminator(half) for half in x.split(2)])
    assert torch.allclose(together, apart, rtol=1e-5, atol=1e-6) == independent


def test_is_initialised_as_pix2pix():
    torch.manual_seed(0)
    for module in Discriminator(DiscriminatorConfig()).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            assert abs(module.weight.std().item() - 0.02) < 0.002
        if isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean().item() - 1) < 0.01 and module.bias.eq(0).all()


@pytest.mark.parametrize("sizes", [dict(norm="instance"), dict(base_channels=0), dict(base_channels=6, norm="group")])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError):
        DiscriminatorConfig(**sizes)


def test_learns_to_tell_two_images_apart():
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(base_channels=8, num_layers=2, norm="group"))
    real, fake = torch.rand(2, 3, 32, 32), -torch.rand(2, 3, 32, 32)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    for _ in range(30):
        loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


@pytest.mark.parametrize("kind", ["bare", "loss module", "va-vae", "repa-e checkpoint"])
def test_loads_from_every_published_place(tmp_path, kind):
    source, target = (Discriminator(DiscriminatorConfig(base_channels=4)) for _ in range(2))
    state, other = source.state_dict(), {"encoder.x": torch.ones(1)}
    torch.save(
        {
            "bare": state,
            "loss module": {"logvar": torch.zeros(()), **{f"discriminator.{k}": v for k, v in state.items()}},
            "va-vae": {"state_dict": {**other, **{f"loss.discriminator.{k}": v for k, v in state.items()}}},
            "repa-e checkpoint": {"vae": other, "discriminator": state, "steps": 3},
        }[kind],
        tmp_path / "discriminator.pt",
    )
    load_discriminator_weights(target, tmp_path / "discriminator.pt")
    assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())


def test_files_that_do_not_fit_are_refused(tmp_path):
    path, target = tmp_path / "discriminator.pt", Discriminator(DiscriminatorConfig(base_channels=4))
    nan = {**target.state_dict(), "main.0.bias": torch.full((4,), float("nan"))}
    for state, words in [
        ({"encoder.conv_in.weight": torch.ones(1)}, "holds no discriminator"),
        (Discriminator(DiscriminatorConfig(base_channels=8)).state_dict(), "8x3x4x4 instead of 4x3x4x4"),
        (nan, r"NaN or inf in 1 weights \(main.0.bias"),
    ]:
        torch.save(state, path)
        with pytest.raises(UserError, match=words):
            load_discriminator_weights(target, path)
