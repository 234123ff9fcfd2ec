"""SiT: published sizes and layout, and an independent plain version on the same weights."""

import dataclasses
import itertools

import pytest
import torch
from plain_sit import plain_sit
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import PRESETS, SiTConfig
from sendvae_fast.ops import use_backend

TINY = dict(
    latent_size=8, latent_channels=3, patch_size=2, width=24, depth=3, num_heads=3, num_classes=5,
    repa_dim=7, repa_block=2, projector_width=16,
)  # fmt: skip


def tiny(**changes) -> SiT:
    """A small SiT whose zero-initialised layers are filled, so that every part shows in the output."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sit


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
    return z_t, torch.rand(4, generator=generator).to(dtype), torch.tensor([0, 4, 5, 2])


def plain(sit: SiT, state: dict, z_t, t, labels):
    """`plain_sit` on weights of `sit`; it rotates queries and keys where it sees LightningDiT's buffers."""
    if sit.config.rope:
        state = {**state, "feat_rope.freqs_cos": None}
    return plain_sit(state, z_t, t, labels, num_heads=sit.config.num_heads, repa_block=sit.config.repa_block)


SWITCHES = [
    dict(), dict(swiglu=True), dict(rms_norm=True), dict(rope=True), dict(qk_norm=True),
    dict(rms_norm=True, qk_norm=True), dict(swiglu=True, rms_norm=True, rope=True, patch_size=1),
]  # fmt: skip


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: " ".join(switches) or "none")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_equals_a_plain_version(switches, dtype, tolerance):
    sit = tiny(**switches).to(dtype)
    z_t, t, labels = inputs(dtype)
    velocity, features = sit(z_t, t, labels, return_features=True)
    expected_velocity, expected_features = plain(sit, sit.state_dict(), z_t, t, labels)
    # In float64 the difference left is the float32 sinusoid of t, and the float32 cosines of rope.
    assert_close(velocity, expected_velocity, rtol=tolerance, atol=tolerance)
    assert_close(features, expected_features, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("switch", ["swiglu", "rms_norm", "rope", "qk_norm"])
def test_every_switch_changes_the_velocity(switch):
    changed = tiny(**{switch: True})
    same = {name: value for name, value in tiny().state_dict().items() if name in changed.state_dict()}
    changed.load_state_dict(same, strict=False)
    assert not torch.allclose(changed(*inputs())[0], tiny()(*inputs())[0], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "size, parameters, projector",
    [
        ("S", 32_871_200, 6_558_464),
        ("B", 130_328_096, 7_344_896),
        ("L", 457_857_056, 7_869_184),
        ("XL", 674_853_152, 8_131_328),
    ],
)
def test_presets_have_the_published_size(size, parameters, projector):
    with torch.device("meta"):
        sit = SiT(SiTConfig.preset(f"SiT-{size}/1", latent_size=16, latent_channels=32, num_classes=1000, repa_dim=768))
        velocity, features = sit(
            torch.empty(2, 32, 16, 16), torch.empty(2), torch.empty(2, dtype=torch.int64), return_features=True
        )
    repa = sum(parameter.numel() for parameter in sit.projectors.parameters())
    assert sum(parameter.numel() for parameter in sit.parameters()) - repa == parameters
    assert repa == projector
    assert velocity.shape == (2, 32, 16, 16) and features.shape == (2, 256, 768)


def test_xl2_on_f8_has_the_published_size():
    with torch.device("meta"):
        sit = SiT(SiTConfig.preset("SiT-XL/2", latent_size=32, latent_channels=4, num_classes=1000))
    assert sum(parameter.numel() for parameter in sit.parameters()) == 674_816_272


LATENTS = {"f8d4": (4, 8), "f16d16": (16, 16), "f16d32": (32, 16), "f16d64": (64, 16)}  # channels, downsampling


@pytest.mark.parametrize(
    "size, parameters", [("S", 32_871_200), ("B", 130_328_096), ("L", 457_857_056), ("XL", 674_853_152)]
)
def test_every_patch_size_latent_and_resolution(size, parameters):
    """Patch size and channels make a difference to the first and the last layer, the resolution to none."""
    for patch, (channels, downsampling), image_size in itertools.product((1, 2, 4, 8), LATENTS.values(), (256, 512)):
        latent_size = image_size // downsampling
        sizes = dict(latent_size=latent_size, latent_channels=channels, num_classes=1000)
        config = SiTConfig.preset(f"SiT-{size}/{patch}", **sizes)
        assert config.grid_shape == (latent_size // patch,) * 2
        one_block = dataclasses.replace(config, depth=1)  # quick to build
        with torch.device("meta"):
            sit = SiT(one_block)
            velocity, _ = sit(
                torch.empty(2, channels, latent_size, latent_size), torch.empty(2), torch.empty(2, dtype=torch.int64)
            )
        assert velocity.shape == (2, channels, latent_size, latent_size)
        width = config.width
        expected = parameters - (config.depth - 1) * (18 * width**2 + 15 * width)
        expected += (patch**2 * channels - 32) * (2 * width + 1)
        assert sum(parameter.numel() for parameter in sit.parameters()) == expected


def test_lightningdit_xl1_has_the_published_size():
    with torch.device("meta"):
        config = SiTConfig.preset("LightningDiT-XL/1", latent_size=16, latent_channels=32, num_classes=1000)
        sit = SiT(config)
    # 675.26 M in LightningDiT's published log, where the fixed positions are a parameter.
    assert round(sum(parameter.numel() for parameter in sit.parameters()) + sit.pos_embed.numel(), -4) == 675_260_000
    keys = {name.removeprefix("blocks.0.") for name in sit.state_dict() if name.startswith("blocks.0.")}
    layers = {
        f"{name}.{kind}"
        for name in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    }
    assert keys == layers | {"norm1.weight", "norm2.weight"}
    assert sit.blocks[0].mlp.w12.weight.shape == (2 * 3072, 1152)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_are_called(name):
    config = SiTConfig.preset(name, latent_size=16, latent_channels=4, num_classes=9)
    assert config.patch_size == int(name.partition("/")[2])
    assert {config.swiglu, config.rms_norm, config.rope} == {name.startswith("Lightning")} and not config.qk_norm
    assert SiTConfig.preset(name, latent_size=16, latent_channels=4, num_classes=9, qk_norm=True).qk_norm


def test_state_dict_has_the_repa_layout():
    keys = {"pos_embed", "x_embedder.proj", "y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"}
    keys |= {"final_layer.linear", "final_layer.adaLN_modulation.1"} | {f"projectors.0.{i}" for i in (0, 2, 4)}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    keys |= {f"blocks.{i}.{part}" for i in range(3) for part in parts}
    state = tiny().state_dict()
    assert {key.removesuffix(".weight").removesuffix(".bias") for key in state} == keys
    assert state["pos_embed"].shape == (1, 16, 24)
    assert state["y_embedder.embedding_table.weight"].shape == (6, 24)


def test_starts_at_zero_velocity_with_blocks_as_identities():
    torch.manual_seed(0)
    sit = SiT(SiTConfig(**{**TINY, "width": 96}))
    velocity, _ = sit(*inputs())
    assert velocity.eq(0).all()
    for block in sit.blocks:
        assert block.adaLN_modulation[1].weight.eq(0).all() and block.adaLN_modulation[1].bias.eq(0).all()
    for weight in (sit.t_embedder.mlp[0].weight, sit.t_embedder.mlp[2].weight, sit.y_embedder.embedding_table.weight):
        assert abs(weight.std().item() - 0.02) < 0.003
    bound = (6 / (3 * 2 * 2 + 96)) ** 0.5
    assert 0.9 * bound < sit.x_embedder.proj.weight.abs().max() <= bound


def test_dropped_labels_become_the_null_class():
    sit = tiny()
    z_t, t, labels = inputs()
    drop = torch.tensor([True, False, False, True])
    dropped, _ = sit(z_t, t, labels, drop)
    expected, _ = sit(z_t, t, torch.tensor([5, 4, 5, 5]))
    assert_close(dropped, expected, rtol=0, atol=0)
    assert not torch.allclose(dropped, sit(z_t, t, labels)[0])


def test_sampling_does_not_run_the_projector():
    sit = tiny()
    ran = []
    sit.projectors[0].register_forward_hook(lambda *_: ran.append(True))
    velocity, features = sit(*inputs())
    assert features is None and not ran
    assert_close(sit(*inputs(), return_features=True)[0], velocity, rtol=0, atol=0)
    assert ran


def test_weights_without_positions_or_with_them_load():
    source, target = tiny(), tiny(num_heads=2)  # the same shapes
    with torch.no_grad():
        target.x_embedder.proj.weight.zero_()
    target.load_state_dict(dict(source.named_parameters()))  # as an EMA is stored
    assert torch.equal(target.x_embedder.proj.weight, source.x_embedder.proj.weight)
    assert torch.equal(target.pos_embed, source.pos_embed)
    target.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="x_embedder"):
        target.load_state_dict({"x_embedder.proj.bias": torch.zeros(24)})


def test_overfits_and_trains_every_weight():
    sit = tiny()
    z_t, t, labels = inputs()
    target, repa_target = torch.randn_like(z_t), torch.randn(4, 16, 7)
    optimizer = torch.optim.Adam(sit.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        velocity, features = sit(z_t, t, labels, return_features=True)
        align = 1 - torch.cosine_similarity(features, repa_target, dim=-1).mean()
        loss = (velocity - target).square().mean() + 0.5 * align
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in sit.parameters())
    assert losses[-1] < 0.4 * losses[0]


def loss_of(velocity, features):
    """Some number that every output has a part in."""
    weights = torch.linspace(-1, 1, velocity.numel()).view_as(velocity)
    return (weights * velocity.float()).sum() + features.float().square().mean()


# The tokens of 3 blocks in bf16 (8 bits) are good to a few per cent of a gradient's norm.
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.03)])
@pytest.mark.parametrize(
    "backend, switches",
    [
        ("reference", {}),
        ("cpu", {}),
        ("cpu", dict(swiglu=True, rms_norm=True, rope=True, qk_norm=True, trained_positions=True)),
    ],
    ids=["reference", "cpu", "every switch"],
)
def test_gradients_are_a_plain_versions(backend, switches, autocast, tolerance):
    sit = tiny(**switches)
    z_t, t, labels = inputs()
    state = {name: x.detach().double().requires_grad_() for name, x in sit.state_dict().items()}
    loss_of(*plain(sit, state, z_t.double(), t.double(), labels)).backward()
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity, features = sit(z_t, t, labels, return_features=True)
    assert velocity.dtype == features.dtype == (torch.bfloat16 if autocast else torch.float32)
    loss_of(velocity, features).backward()
    for name, parameter in sit.named_parameters():
        true = state[name].grad
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - true).norm() <= tolerance * true.norm(), name


def test_positions_are_trained_only_if_asked_for():
    fixed, trained = tiny(), SiT(SiTConfig(**TINY, trained_positions=True))
    assert torch.equal(trained.pos_embed, fixed.pos_embed)
    names = [[name for name, _ in sit.named_parameters()] for sit in (trained, fixed)]
    assert names[0] == ["pos_embed", *names[1]] and list(trained.state_dict()) == list(fixed.state_dict())


@pytest.mark.slow
def test_blocks_with_every_switch_compile_whole():
    sit = tiny(swiglu=True, rms_norm=True, rope=True, qk_norm=True)
    expected, _ = sit(*inputs())
    for block in sit.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="eager")
    assert_close(sit(*inputs())[0], expected, rtol=1e-6, atol=1e-6)


def test_runs_in_bfloat16():
    sit = tiny().bfloat16()
    z_t, t, labels = inputs()
    velocity, _ = sit(z_t.bfloat16(), t, labels)
    assert velocity.dtype == torch.bfloat16 and velocity.isfinite().all()


def test_large_activations_stay_finite_under_autocast():
    """Tokens of 1e4 and modulations of hundreds, as late in a long run in bf16."""
    sit = tiny()
    with torch.no_grad():
        sit.x_embedder.proj.bias.add_(1e4)
        for block in sit.blocks:
            block.adaLN_modulation[1].bias.mul_(1e3)
    z_t, t, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        velocity, features = sit(1e2 * z_t, t, labels, return_features=True)
        loss = velocity.float().square().mean() + features.float().square().mean()
    loss.backward()
    assert velocity.isfinite().all() and features.isfinite().all() and loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in sit.parameters())


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(repa_block=4), "repa_block=4 must be between 1 and depth=3"),
        (dict(repa_block=0), "repa_block=0"),
        (dict(latent_size=9), "latent_size=9"),
        (dict(num_heads=5), "num_heads=5"),
        (dict(label_dropout=1.0), "label_dropout"),
        (dict(depth=0), "depth is 0"),
        (dict(rope=True, num_heads=4), r"width=24 / num_heads=4 is 6"),
    ],
)
def test_impossible_sizes_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tiny(**changes)


def test_misuse_is_refused():
    assert tiny(repa_dim=None, repa_block=8).config.repa_block == 8  # without a projector the block does not matter
    with pytest.raises(ValueError, match="repa_dim"):
        tiny(repa_dim=None)(*inputs(), return_features=True)
    with pytest.raises(UserError, match="3 x 8 x 8 but got 3 x 4 x 4"):
        tiny()(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="unknown SiT preset 'SiT-M/1', did you mean 'SiT-"):
        SiTConfig.preset("SiT-M/1", latent_size=8, latent_channels=4, num_classes=2)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_takes_flattened_patches(patch_size):
    sit = tiny(patch_size=patch_size).double()
    z_t, t, labels = inputs(torch.float64)
    patches = torch.nn.functional.unfold(z_t, patch_size, stride=patch_size).mT
    assert_close(sit(patches, t, labels)[0], sit(z_t, t, labels)[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="but got 15 x|but got 63 x"):
        sit(patches[:, 1:], t, labels)
