"""Foundation models from files in the layouts of their releases, against a plain vision transformer."""

import dataclasses

import plain_vit as plain
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.foundation.recipes import RECIPES

pytestmark = pytest.mark.slow

GRID = 4
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINOV3_PERIODS = 100 ** (torch.arange(3) / 3)  # for heads of 12


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Every recipe's network two blocks deep and 48 wide."""
    for name, recipe in RECIPES.items():
        monkeypatch.setitem(RECIPES, name, dataclasses.replace(recipe, arguments=recipe.arguments | plain.NETWORK))


def load(name, path, **options):
    return load_foundation(FoundationConfig(name=name, weights=str(path), grid_size=GRID, **options))


def images(network_size):
    """Every model resizes, by 4/5: a step that float32 holds exactly, so that only pixels are rounded."""
    shape = 2, 3, network_size * 5 // 4, network_size * 5 // 4
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def check(foundation, expected):
    actual = foundation(images(foundation.image_size))
    assert actual.dtype == torch.float32 and expected.abs().mean() > 0.1
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# -- DINOv2: 37 x 37 positions, here 5 x 5, a mask token, layer scale --------------------------------------------------


def dinov2_weights(**options):
    state = plain.random_weights(14, prefix_positions=1, grid=5, layer_scale=True, **options)
    return state | {"cls_token": plain.random_token(), "mask_token": torch.zeros(1, plain.WIDTH)}


def dinov2_tokens(state, prefix=()):
    x = plain.preprocessed(images(56), 56, *IMAGENET)
    prefix = [(state["cls_token"], True), *prefix]
    return plain.patch_tokens(state, x, GRID, prefix=prefix, activation=plain.gelu, eps=1e-6)


def test_dinov2_release(tmp_path):
    state = dinov2_weights()
    torch.save(state, tmp_path / "dinov2_vitb14_pretrain.pth")
    check(load("dinov2-vit-b", tmp_path / "dinov2_vitb14_pretrain.pth"), dinov2_tokens(state))


def test_dinov2_release_with_registers(tmp_path):
    state = dinov2_weights() | {"register_tokens": plain.random_token(4, seed=2)}
    torch.save(state, tmp_path / "dinov2_vitb14_reg4_pretrain.pth")
    expected = dinov2_tokens(state, prefix=[(state["register_tokens"], False)])
    check(load("dinov2reg-vit-b", tmp_path / "dinov2_vitb14_reg4_pretrain.pth"), expected)


def test_dinov2_giant_release(tmp_path):
    """Its MLP is gated."""
    state = dinov2_weights(swiglu=True, hidden=128)
    torch.save(state, tmp_path / "dinov2_vitg14_pretrain.pth")
    check(load("dinov2-vit-g", tmp_path / "dinov2_vitg14_pretrain.pth"), dinov2_tokens(state))


# -- DINOv3: rotary positions, registers; the release has biases and rounded periods -----------------------------------


def dinov3_tokens(state, registers, periods):
    x = plain.preprocessed(images(64), 64, *IMAGENET, interpolation="bilinear", antialias=True)
    prefix = [(state["cls_token"], False), (registers, False)]
    return plain.patch_tokens(state, x, GRID, prefix=prefix, activation=plain.gelu, eps=1e-5, periods=periods)


def dinov3_weights(query_key_value_bias):
    state = plain.random_weights(16, prefix_positions=None, grid=GRID, layer_scale=True)
    for i in range(plain.DEPTH):
        query, key, value = state[f"blocks.{i}.attn.qkv.bias"].chunk(3)
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([query, 0 * key, value]) * query_key_value_bias
    return state | {"cls_token": plain.random_token()}


def test_dinov3_release(tmp_path):
    state, registers = dinov3_weights(query_key_value_bias=1), plain.random_token(4, seed=2)
    periods = DINOV3_PERIODS.bfloat16().float()
    assert not torch.equal(periods, DINOV3_PERIODS)
    mask = torch.ones(3, plain.WIDTH).index_fill_(0, torch.tensor(1), 0).flatten()
    masks = {f"blocks.{i}.attn.qkv.bias_mask": mask for i in range(plain.DEPTH)}
    own = {"storage_tokens": registers, "mask_token": torch.zeros(1, plain.WIDTH), "rope_embed.periods": periods}
    torch.save(state | masks | own, tmp_path / "dinov3_vitb16_pretrain.pth")
    check(load("dinov3-vit-b", tmp_path / "dinov3_vitb16_pretrain.pth"), dinov3_tokens(state, registers, periods))


def test_dinov3_of_timm(tmp_path):
    state, registers = dinov3_weights(query_key_value_bias=0), plain.random_token(4, seed=2)
    renamed = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in state.items()
        if not name.endswith("qkv.bias")
    }
    save_file(renamed | {"reg_token": registers}, tmp_path / "model.safetensors")
    check(load("dinov3-vit-b", tmp_path / "model.safetensors"), dinov3_tokens(state, registers, DINOV3_PERIODS))


# -- MAE, I-JEPA, SigLIP -----------------------------------------------------------------------------------------------


def mae_weights():
    return plain.random_weights(16, prefix_positions=1, grid=3) | {"cls_token": plain.random_token()}


def mae_tokens(state):
    x = plain.preprocessed(images(64), 64, *IMAGENET)
    prefix = [(state["cls_token"], True)]
    return plain.patch_tokens(state, x, GRID, prefix=prefix, activation=plain.gelu, eps=1e-6, final_norm=False)


def test_mae_release(tmp_path):
    state = mae_weights()
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_large.pth")
    check(load("mae-vit-l", tmp_path / "mae_pretrain_vit_large.pth"), mae_tokens(state))


def test_mae_release_with_its_decoder(tmp_path):
    state = mae_weights()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, plain.WIDTH)}
    torch.save({"model": state | decoder}, tmp_path / "mae_visualize_vit_large.pth")
    check(load("mae-vit-l", tmp_path / "mae_visualize_vit_large.pth"), mae_tokens(state))


def test_ijepa_release(tmp_path):
    """The encoder's weights and not those of its moving average; no class token."""
    state = plain.random_weights(14, prefix_positions=0, grid=GRID)
    checkpoint = {
        "encoder": {f"module.{name}": value for name, value in state.items()},
        "predictor": {"module.predictor_embed.weight": torch.zeros(8, plain.WIDTH)},
        "target_encoder": {f"module.{name}": 0 * value for name, value in state.items()},
        "epoch": 300,
    }
    torch.save(checkpoint, tmp_path / "IN1K-vit.h.14-300e.pth.tar")
    x = plain.preprocessed(images(56), 56, *IMAGENET)
    expected = plain.patch_tokens(state, x, GRID, activation=plain.gelu, eps=1e-6)
    check(load("ijepa-vit-h", tmp_path / "IN1K-vit.h.14-300e.pth.tar"), expected)


def test_siglip_of_timm(tmp_path):
    """The pooling head is there and not used; GELU is approximate; ImageNet's mean and standard deviation."""
    state = plain.random_weights(16, prefix_positions=0, grid=GRID)
    pool = {
        f"attn_pool.{name}": torch.zeros(shape)
        for name, shape in {
            "latent": (1, 1, 48), "q.weight": (48, 48), "q.bias": (48,), "kv.weight": (96, 48), "kv.bias": (96,),
            "proj.weight": (48, 48), "proj.bias": (48,), "norm.weight": (48,), "norm.bias": (48,),
            "mlp.fc1.weight": (192, 48), "mlp.fc1.bias": (192,), "mlp.fc2.weight": (48, 192), "mlp.fc2.bias": (48,),
        }.items()
    }  # fmt: skip
    save_file(state | pool, tmp_path / "model.safetensors")
    x = plain.preprocessed(images(64), 64, *IMAGENET)
    expected = plain.patch_tokens(state, x, GRID, activation=plain.gelu_tanh, eps=1e-6)
    for name in ("siglip-b", "siglip2-l"):
        check(load(name, tmp_path / "model.safetensors"), expected)


# -- CLIP: other names, half precision, a norm before the blocks -------------------------------------------------------


def clip_weights():
    """In our names, and in OpenAI's for the image tower."""
    state = plain.random_weights(14, prefix_positions=1, grid=5)
    state |= {"norm_pre.weight": state["norm.weight"] + 1, "norm_pre.bias": state["norm.bias"]}
    state |= {"cls_token": plain.random_token()}
    del state["patch_embed.proj.bias"]
    state = {name: value.half() for name, value in state.items()}
    renames = {
        "patch_embed.proj": "conv1", "pos_embed": "positional_embedding", "cls_token": "class_embedding",
        "norm_pre": "ln_pre", "norm1": "ln_1", "norm2": "ln_2", "norm.": "ln_post.",
        "blocks": "transformer.resblocks", "qkv.": "in_proj_", "attn.proj": "attn.out_proj", "fc1": "c_fc",
        "fc2": "c_proj",
    }  # fmt: skip
    openai = {}
    for name, value in state.items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        openai[name] = value.squeeze() if name in ("positional_embedding", "class_embedding") else value
    return state, openai | {"proj": torch.zeros(plain.WIDTH, 8)}


@pytest.mark.parametrize("layout", ["whole", "image tower"])
def test_clip_release(layout, tmp_path):
    state, openai = clip_weights()
    if layout == "whole":
        text = {"transformer.resblocks.0.ln_1.weight": torch.zeros(8), "text_projection": torch.zeros(8, 8)}
        openai = {f"visual.{name}": value for name, value in openai.items()} | text
    torch.save(openai, tmp_path / "clip.pth")
    x = plain.preprocessed(images(56), 56, *CLIP)
    prefix = [(state["cls_token"], True)]
    options = dict(activation=plain.quick_gelu, eps=1e-5, norm_pre=True, final_norm=False)
    check(load("clip-vit-l", tmp_path / "clip.pth"), plain.patch_tokens(state, x, GRID, prefix=prefix, **options))


# -- what is refused ---------------------------------------------------------------------------------------------------


def without(state, word):
    return {name: value for name, value in state.items() if word not in name}


BROKEN = {
    "truncated": (lambda s: without(s, "blocks.1."), "mae-vit-b", "missing .blocks.1"),
    "too deep": (lambda s: s | {"blocks.2.norm1.weight": torch.ones(48)}, "mae-vit-b", "unexpected .blocks.2"),
    "another width": (lambda s: s | {"norm.weight": torch.ones(64)}, "mae-vit-b", "norm.weight 64 instead of 48"),
    "another patch": (lambda s: s, "dinov2-vit-b", "patches of 16 px, vit_base_patch14_dinov2 has 14"),
    "another family": (lambda s: s, "siglip-b", "does not fit.*another model's weights"),
    "a ViT for DINOv3": (lambda s: s, "dinov3-vit-b", "does not fit.*missing.*reg_token"),
    "NaN": (lambda s: s | {"norm.bias": torch.full((48,), float("nan"))}, "mae-vit-b", "NaN or inf in 1 weights"),
    "cut positions": (lambda s: s | {"pos_embed": torch.ones(1, 8, 48)}, "mae-vit-b", "does not fit.*pos_embed"),
    "flat positions": (lambda s: s | {"pos_embed": torch.ones(48)}, "mae-vit-b", "positions or patches are of another"),
    "flat patches": (
        lambda s: s | {"patch_embed.proj.weight": torch.ones(48)},
        "dinov3-vit-b",
        "positions or patches are of another",
    ),
    "transformers": (
        lambda s: {f"vit.embeddings.{name}": value for name, value in without(s, "patch").items()},
        "mae-vit-b",
        "files of transformers are not read.*timm/vit_base_patch16_224.mae.*mae_pretrain_vit_base.pth",
    ),
    "no dictionary": (lambda s: list(s.values()), "mae-vit-b", "holds a list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_weights_get_one_clear_line(name, tmp_path):
    change, foundation, words = BROKEN[name]
    torch.save(change(mae_weights()), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=words) as error:
        load(foundation, tmp_path / "weights.pth")
    assert "\n" not in str(error.value) and "weights.pth" in str(error.value)


def test_a_file_that_ends_early_gets_one_clear_line(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(mae_weights(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="is broken.*fetch it again"):
        load("mae-vit-b", path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_openais_torchscript_file_is_not_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.LayerNorm(2)), tmp_path / "ViT-L-14.pt")
    with pytest.raises(UserError, match="TorchScript archive, a program that is not run here.*state_dict") as error:
        load("clip-vit-l", tmp_path / "ViT-L-14.pt")
    assert "\n" not in str(error.value)
