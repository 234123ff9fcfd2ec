"""`accelerate` on diffusers' networks and on sequences: the same outputs, gradients, names and parameters."""

import copy

import pytest
import torch
from numerics import BACKWARD_FACTOR, FORWARD_FACTOR, assert_error_within
from torch import nn
from torch.testing import assert_close

from sendvae_fast.nn import GroupNormSiLU, accelerate

diffusers = pytest.importorskip("diffusers")

BLOCKS = dict(block_out_channels=(16, 32), norm_num_groups=8)
TWO = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
SPATIAL = dict(block_out_channels=(32, 64), norm_num_groups=8, norm_type="spatial")
NETWORKS = {
    # Pairs: two in each of 2 + 2 and 4 + 2 residual blocks, and the last of encoder and decoder.
    "AutoencoderKL": (lambda: diffusers.AutoencoderKL(**TWO, **BLOCKS), 22),
    "VQModel": (lambda: diffusers.VQModel(**TWO, **BLOCKS, num_vq_embeddings=8), 22),
    # Every norm of its decoder is modulated by the latent: the encoder's alone.
    "spatial norms": (lambda: diffusers.VQModel(**TWO, **SPATIAL, num_vq_embeddings=8), 9),
    "other activation": (lambda: diffusers.AutoencoderKL(**TWO, **BLOCKS, act_fn="gelu"), 2),
}


def results(network: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pictures and moments, and the gradients of all parameters."""
    moments = network.encoder(x)
    pictures = network.decoder(moments[:, : network.config.latent_channels])
    loss = pictures.square().mean() + moments.mean()
    gradients = torch.autograd.grad(loss, [*network.parameters()], allow_unused=True)
    return [pictures.detach(), moments.detach()], [g for g in gradients if g is not None]


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel"])
def test_a_network_is_the_same_within_rounding(name):
    torch.manual_seed(0)
    network, x = NETWORKS[name][0](), torch.rand(2, 3, 16, 16) * 2 - 1
    parameters, keys = dict(network.named_parameters()), list(network.state_dict())
    plain, truth = results(network, x), results(copy.deepcopy(network).double(), x.double())
    assert accelerate(network) == NETWORKS[name][1]
    ours = results(network, x)
    # A network rounds at every layer, ours elsewhere than torch's.
    assert_error_within(ours[0], plain[0], truth[0], FORWARD_FACTOR)
    assert_error_within(ours[1], plain[1], truth[1], BACKWARD_FACTOR)
    assert list(network.state_dict()) == keys
    assert all(parameter is parameters[key] for key, parameter in network.named_parameters())
    assert accelerate(network) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_known_is_swapped_and_counted(name):
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = network(images).sample
        assert accelerate(network) == NETWORKS[name][1]
        assert_close(network(images).sample, before)
    assert sum(isinstance(part, GroupNormSiLU) for part in network.modules()) == NETWORKS[name][1]


def test_state_dicts_fit_both_ways():
    torch.manual_seed(0)
    plain, fast = NETWORKS["AutoencoderKL"][0](), NETWORKS["AutoencoderKL"][0]()
    accelerate(fast)
    x = torch.rand(1, 3, 16, 16)
    fast.load_state_dict(plain.state_dict())
    assert_close(fast(x).sample, plain(x).sample)
    nn.init.normal_(fast.decoder.conv_norm_out.weight)
    plain.load_state_dict(fast.state_dict())
    assert_close(fast(x).sample, plain(x).sample)


def test_blocks_with_a_time_embedding_stay():
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        **BLOCKS, layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    keys = {name: type(part) for name, part in network.named_modules()}
    assert accelerate(network) == 0
    assert {name: type(part) for name, part in network.named_modules()} == keys


def test_a_modulation_between_norm_and_activation_stays():
    block = diffusers.models.resnet.ResnetBlock2D(
        in_channels=8, groups=2, temb_channels=None, time_embedding_norm="scale_shift"
    )
    x, modulation = torch.randn(1, 8, 4, 4), torch.randn(1, 16, 1, 1)
    before = block(x, modulation)
    assert accelerate(block) == 0
    assert torch.equal(block(x, modulation), before)


def test_one_activation_in_many_blocks():
    """Older versions of diffusers share them."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        diffusers.models.resnet.ResnetBlock2D(in_channels=8, groups=2, temb_channels=channels) for channels in (None, 5)
    )
    blocks[1].nonlinearity = blocks[0].nonlinearity
    x, embedding = torch.randn(1, 8, 4, 4), torch.randn(1, 5)
    before = blocks[0](x, None), blocks[1](x, embedding)
    assert accelerate(blocks) == 2
    assert_close((blocks[0](x, None), blocks[1](x, embedding)), before)


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.0), nn.GroupNorm(4, 8),
        nn.SiLU(inplace=True), nn.GroupNorm(4, 8), nn.ReLU(), nn.SiLU(), nn.GroupNorm(2, 8, affine=False), nn.SiLU(),
    ]  # fmt: skip
    for part in parts:
        for parameter in part.parameters():
            nn.init.normal_(parameter)
    return nn.Sequential(*parts)


def test_sequences():
    plain, fast = sequence(), nn.ModuleDict({"inner": nn.Sequential(sequence())})
    assert accelerate(fast) == 2
    assert accelerate(fast) == 0
    x = torch.randn(2, 4, 5, 5)
    fast = fast["inner"][0]
    assert_close(fast(x), plain(x))
    assert list(fast.state_dict()) == list(plain.state_dict())
    for part in (slice(0, 2), slice(0, 3), slice(2, 5)):  # as networks that modulate in between take sequences apart
        x = torch.randn(2, 4 if part.start == 0 else 8, 5, 5)
        assert_close(fast[part](x), plain[part](x))
    assert_close(nn.Sequential(*fast[1:3])(x), nn.Sequential(*plain[1:3])(x))


def test_a_sequence_as_the_whole_network_and_maps_of_other_ranks():
    plain, fast = (nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()) for _ in range(2))
    assert accelerate(fast) == 1
    for shape in ((2, 8), (2, 8, 5), (2, 8, 5, 3), (2, 8, 3, 2, 2)):
        x = torch.randn(shape)
        assert_close(fast(x), plain(x))
    x = torch.randn(2, 8, 5, 3)
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))


def test_subclasses_are_not_known():
    class Scaled(nn.GroupNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class Backwards(nn.Sequential):
        def forward(self, x):
            return self[0](self[1](x))

    assert accelerate(nn.Sequential(Scaled(2, 8), nn.SiLU())) == 0
    assert accelerate(Backwards(nn.GroupNorm(2, 8), nn.SiLU())) == 0


def test_a_norm_in_two_places():
    norm = nn.GroupNorm(2, 8)
    network = nn.ModuleList([nn.Sequential(norm, nn.SiLU()), nn.Sequential(norm)])
    x = torch.randn(2, 8, 3, 3)
    before = [part(x) for part in network]
    assert accelerate(network) == 1
    assert_close([part(x) for part in network], before)


def test_only_modules():
    with pytest.raises(TypeError, match="takes an nn.Module, got a dict"):
        accelerate({})
