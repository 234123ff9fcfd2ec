"""SiT: published sizes and layout, and an independent plain version on the same weights."""

import math

import pytest
import torch
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.sit import SiT, SiTConfig
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


def plain_sit(state: dict, z_t, t, labels, config: SiTConfig):
    """The forward pass written from the fact sheet, token by token where that is simplest."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def layer_norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)

    patch, grid, heads = config.patch_size, config.latent_size // config.patch_size, config.num_heads
    tokens = []
    kernel = state["x_embedder.proj.weight"].flatten(1)
    for row in range(grid):
        for column in range(grid):
            part = z_t[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(part.flatten(1) @ kernel.T + state["x_embedder.proj.bias"])
    x = torch.stack(tokens, 1) + state["pos_embed"]

    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = t.double()[:, None] * frequencies
    sinusoid = torch.cat([torch.cos(angles), torch.sin(angles)], 1).to(x.dtype)
    condition = linear(silu(linear(sinusoid, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    condition = condition + state["y_embedder.embedding_table.weight"][labels]

    features = None
    for index in range(config.depth):
        block = f"blocks.{index}"
        modulation = linear(silu(condition), f"{block}.adaLN_modulation.1")[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = torch.tensor_split(modulation, 6, dim=-1)
        q, k, v = torch.tensor_split(linear(layer_norm(x) * (1 + scale_a) + shift_a, f"{block}.attn.qkv"), 3, dim=-1)
        attended = []
        for q_h, k_h, v_h in zip(*(torch.tensor_split(part, heads, dim=-1) for part in (q, k, v)), strict=True):
            scores = torch.einsum("bnd,bmd->bnm", q_h, k_h) / math.sqrt(q_h.shape[-1])
            attended.append(torch.softmax(scores, -1) @ v_h)
        x = x + gate_a * linear(torch.cat(attended, -1), f"{block}.attn.proj")
        h = linear(layer_norm(x) * (1 + scale_m) + shift_m, f"{block}.mlp.fc1")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate_m * linear(h, f"{block}.mlp.fc2")
        if index + 1 == config.repa_block:
            h = silu(linear(x, "projectors.0.0"))
            features = linear(silu(linear(h, "projectors.0.2")), "projectors.0.4")

    shift, scale = torch.tensor_split(linear(silu(condition), "final_layer.adaLN_modulation.1")[:, None], 2, dim=-1)
    x = linear(layer_norm(x) * (1 + scale) + shift, "final_layer.linear")
    velocity = torch.zeros_like(z_t)
    for n in range(grid * grid):
        top, left = n // grid * patch, n % grid * patch
        pixels = x[:, n].reshape(-1, patch, patch, config.latent_channels).permute(0, 3, 1, 2)
        velocity[:, :, top : top + patch, left : left + patch] = pixels
    return velocity, features


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_equals_a_plain_version(dtype, tolerance):
    sit = tiny().to(dtype)
    z_t, t, labels = inputs(dtype)
    velocity, features = sit(z_t, t, labels, return_features=True)
    expected_velocity, expected_features = plain_sit(sit.state_dict(), z_t, t, labels, sit.config)
    # In float64 the difference left is the float32 sinusoid of t.
    assert_close(velocity, expected_velocity, rtol=tolerance, atol=tolerance)
    assert_close(features, expected_features, rtol=tolerance, atol=tolerance)


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
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_are_a_plain_versions(backend, autocast, tolerance):
    sit = tiny()
    z_t, t, labels = inputs()
    state = {name: x.detach().double().requires_grad_() for name, x in sit.state_dict().items()}
    loss_of(*plain_sit(state, z_t.double(), t.double(), labels, sit.config)).backward()
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity, features = sit(z_t, t, labels, return_features=True)
    assert velocity.dtype == features.dtype == (torch.bfloat16 if autocast else torch.float32)
    loss_of(velocity, features).backward()
    for name, parameter in sit.named_parameters():
        true = state[name].grad
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - true).norm() <= tolerance * true.norm(), name


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
    with pytest.raises(UserError, match="SiT-XL/1"):
        SiTConfig.preset("SiT-M/1", latent_size=8, latent_channels=4, num_classes=2)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_takes_flattened_patches(patch_size):
    sit = tiny(patch_size=patch_size).double()
    z_t, t, labels = inputs(torch.float64)
    patches = torch.nn.functional.unfold(z_t, patch_size, stride=patch_size).mT
    assert_close(sit(patches, t, labels)[0], sit(z_t, t, labels)[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="but got 15 x|but got 63 x"):
        sit(patches[:, 1:], t, labels)
