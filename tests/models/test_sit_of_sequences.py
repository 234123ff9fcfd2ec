"""SiT and LightningDiT on latents that are a sequence, and MAETok's published SiT."""

import math

import pytest
import torch
from maetok_weights import filled
from plain_sit import plain_sit
from safetensors.torch import save_file
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.positions import sincos_1d
from sendvae_fast.models.sit.published_layouts import from_published, to_lightningdit, to_repa
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig, fields_of_latents
from sendvae_fast.models.sit.storage import load_initial_weights, load_sit, save_sit

SHAPE = (3, 1, 5)
LIGHTNING = dict(swiglu=True, rms_norm=True, rope=True)


def random_sit(**options) -> SiT:
    torch.manual_seed(0)
    sizes = dict(patch_size=1, width=32, depth=2, num_heads=2, num_classes=4, **fields_of_latents(SHAPE))
    sit = SiT(SiTConfig(**sizes | options))
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return sit.eval()


@pytest.mark.parametrize("options", [{}, LIGHTNING, {"qk_norm": True}], ids=["SiT", "LightningDiT", "qk_norm"])
@torch.no_grad()
def test_the_velocity_is_the_plain_networks(options):
    sit = random_sit(**options).double()
    z, t, labels = torch.randn(3, *SHAPE).double(), torch.rand(3), torch.tensor([0, 4, 2])
    state = dict(sit.state_dict()) | ({"feat_rope.freqs_cos": torch.ones(1)} if options.get("rope") else {})
    expected, _ = plain_sit(state, z, t, labels, num_heads=2)
    velocity, _ = sit(z, t, labels)
    assert velocity.shape == z.shape
    # Time is embedded, and queries are turned, by float32 tables.
    assert_close(velocity, expected, rtol=0, atol=1e-6)
    assert_close(sit(z.flatten(2).transpose(1, 2), t, labels)[0], velocity, rtol=0, atol=1e-12)


def test_positions_are_those_of_the_transformers_paper():
    expected = [
        [f(n / 10000 ** (i / 24)) for i in range(0, 24, 2) for f in (math.sin, math.cos)] for n in range(130)
    ]  # fmt: skip
    assert_close(sincos_1d(24, 130), torch.tensor(expected), rtol=0, atol=1e-7)
    assert torch.equal(random_sit().pos_embed[0], sincos_1d(32, 5))


# What the authors' code (Hhhhhhao/continuous_tokenizer at 7cc3e96, SiT with vae_1d) made of `filled` weights, positions
# among them, and of `inputs`, in float64: the velocity of the first two tokens.
RECORDED = [
    [[-0.1493431523213516, -0.2749080744748526, 1.6362809037887673],
     [-4.933271909693743, 4.260303861344307, 1.1264539596770808]],
    [[-0.40889569896041195, -0.5419264002198385, 0.9519504098096873],
     [-3.8079503497947664, 2.3797097757017696, 1.1589925623048472]],
]  # fmt: skip


def published_shapes(width=384, depth=1, tokens=5, channels=3, num_classes=7):
    """Names and shapes of the authors' checkpoint."""

    def layer(name, size, fan_in):
        return {f"{name}.weight": (size, fan_in), f"{name}.bias": (size,)}

    shapes = {"pos_embed": (1, tokens, width), "y_embedder.embedding_table.weight": (num_classes + 1, width)}
    shapes |= layer("x_embedder", width, channels) | layer("final_layer.linear", channels, width)
    shapes |= layer("t_embedder.mlp.0", width, 256) | layer("t_embedder.mlp.2", width, width)
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= layer(f"{block}.attn.qkv", 3 * width, width) | layer(f"{block}.attn.proj", width, width)
        shapes |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
        shapes |= layer(f"{block}.adaLN_modulation.1", 6 * width, width)
    return shapes | layer("final_layer.adaLN_modulation.1", 2 * width, width)


def inputs():
    """Latents float64 [2, 3, 1, 5], times, labels."""
    z = torch.sin(torch.arange(30, dtype=torch.float64).square()).reshape(2, *SHAPE)
    return z, torch.tensor([0.25, 0.875], dtype=torch.float64), torch.tensor([2, 7])


@torch.no_grad()
def test_maetoks_published_sit_is_its_authors():
    config, state = from_published(filled(published_shapes()), "a test")
    assert config.latent_shape == SHAPE and (config.num_heads, config.num_classes, config.repa_dim) == (6, 7, None)
    sit = SiT(config).double()
    sit.load_state_dict(state)
    velocity, _ = sit.eval()(*inputs())
    # Time is embedded in float32.
    assert_close(velocity[:, :, 0, :2].transpose(1, 2), torch.tensor(RECORDED, dtype=torch.float64), rtol=0, atol=1e-6)


def test_its_file_is_read_as_a_generator_and_a_start(tmp_path):
    state = {name: value.float() for name, value in filled(published_shapes()).items()}
    torch.save({"model": {}, "ema": {f"_orig_mod.{name}": value for name, value in state.items()}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="has no latent statistics"):
        load_sit(tmp_path / "x.pt")
    saved = load_sit(tmp_path / "x.pt", scaling_factor=1.0)
    raw = saved.sit.state_dict()
    save_sit(tmp_path / "ours", saved.sit.config, raw, raw, *saved[1:3])
    ours = load_sit(tmp_path / "ours").sit
    assert ours.config == saved.sit.config and torch.equal(
        ours.x_embedder.proj.weight[:, :, 0, 0], state["x_embedder.weight"]
    )
    fresh = SiT(ours.config)
    load_initial_weights(fresh, tmp_path / "x.pt")
    assert all(torch.equal(value, raw[name]) for name, value in fresh.state_dict().items())
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text('{"vae_1d": true, "hidden_size": 384}')
    save_file(state, folder / "model.safetensors")
    theirs = load_sit(folder, scaling_factor=1.0).sit.state_dict()
    assert theirs.keys() == raw.keys() and all(torch.equal(value, raw[name]) for name, value in theirs.items())
    square = SiT(SiTConfig.preset("SiT-S/1", depth=1, latent_channels=3, latent_size=5, num_classes=7))
    with pytest.raises(UserError, match="has a generator of one_dimensional=True, but this run's has .*=False"):
        load_initial_weights(square, tmp_path / "x.pt")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 5}, "patch_size=5 is for latents that are a grid, and these are a sequence of 5 tokens"),
        ({"repa_dim": 8, "repa_block": 1}, "REPA aligns tokens with the patches .* set repa.weight=0"),
    ],
)
def test_what_a_sequence_has_not_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        random_sit(**options)


def test_latents_and_layouts_that_are_no_sequences(tmp_path):
    with pytest.raises(UserError, match="the latents are 3 x 2 x 4, and a generator is for square ones or a sequence"):
        fields_of_latents((3, 2, 4))
    assert not fields_of_latents((3, 1, 1))["one_dimensional"]
    statistics = torch.zeros(3), torch.ones(3)
    for write in (lambda: to_repa(random_sit(), *statistics, False), lambda: to_lightningdit(random_sit(**LIGHTNING))):
        with pytest.raises(UserError, match="latents that are a sequence, as no such checkpoint is"):
            write()
    with pytest.raises(UserError, match="built for latents of 3 x 1 x 5 but got 3 x 5 x 5"):
        random_sit()(torch.zeros(1, 3, 5, 5), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
