"""Foundation models: what goes in, which features come out, and no network."""

import json
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.foundation.recipes import RECIPES

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a foundation model reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def images(size, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def normalised(x, mean_std):
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in mean_std)
    return (x.float() / 255 - mean) / std


def random_foundation(name, **options):
    torch.manual_seed(0)
    return load_foundation(FoundationConfig(name=name, random_weights=True, **options))


# name, image size, width, (mean, std); 256 tokens each: section 2.4 of the fact sheet
TABLE = [
    ("dinov2-vit-s", 224, 384, IMAGENET),
    ("dinov2-vit-b", 224, 768, IMAGENET),
    ("dinov2-vit-l", 224, 1024, IMAGENET),
    ("dinov2-vit-g", 224, 1536, IMAGENET),
    ("dinov2reg-vit-s", 224, 384, IMAGENET),
    ("dinov2reg-vit-b", 224, 768, IMAGENET),
    ("dinov2reg-vit-l", 224, 1024, IMAGENET),
    ("dinov2reg-vit-g", 224, 1536, IMAGENET),
    ("dinov3-vit-s", 256, 384, IMAGENET),
    ("dinov3-vit-splus", 256, 384, IMAGENET),
    ("dinov3-vit-b", 256, 768, IMAGENET),
    ("dinov3-vit-l", 256, 1024, IMAGENET),
    ("dinov3-vit-hplus", 256, 1280, IMAGENET),
    ("dinov3-vit-7b", 256, 4096, IMAGENET),
    ("mae-vit-b", 256, 768, IMAGENET),
    ("mae-vit-l", 256, 1024, IMAGENET),
    ("siglip-b", 256, 768, IMAGENET),
    ("siglip-l", 256, 1024, IMAGENET),
    ("siglip-so400m", 224, 1152, IMAGENET),
    ("siglip2-b", 256, 768, IMAGENET),
    ("siglip2-l", 256, 1024, IMAGENET),
    ("siglip2-so400m", 256, 1152, IMAGENET),
    ("siglip2-g", 256, 1536, IMAGENET),
    ("clip-vit-l", 224, 1024, CLIP),
    ("ijepa-vit-h", 224, 1280, IMAGENET),
]


@pytest.mark.parametrize("name, image_size, dim, mean_std", TABLE, ids=[row[0] for row in TABLE])
def test_named_models_want_and_give_what_the_papers_say(name, image_size, dim, mean_std):
    with torch.device("meta"):
        foundation = load_foundation(FoundationConfig(name=name, random_weights=True))
    assert (foundation.image_size, foundation.dim, foundation.grid_size) == (image_size, dim, 16)
    preprocessing, recipe = foundation.preprocessing, RECIPES[name]
    assert (tuple(preprocessing.mean), tuple(preprocessing.std)) == mean_std
    resampling = ("bilinear", True) if name.startswith("dinov3") else ("bicubic", False)
    assert (preprocessing.interpolation, preprocessing.antialias) == resampling
    assert recipe.final_norm == (name not in ("mae-vit-b", "mae-vit-l", "clip-vit-l"))
    # timm publishes weights under that name, so the error message names a file that exists.
    published = timm.get_pretrained_cfg(f"{recipe.timm_name}.{recipe.tag}")
    assert (published.hf_hub_id or published.url.rsplit("/", 1)[-1]) in recipe.weight_files


def test_table_is_complete():
    assert sorted(row[0] for row in TABLE) == sorted(RECIPES)


def test_images_of_another_size_are_resized_as_in_repa():
    """REPA: /255, mean and std, then bicubic without antialiasing."""
    foundation = random_foundation("vit_tiny_patch16_224", image_size=32)
    small, large = images(24), images(48)
    for x in (small, large):
        resized = F.interpolate(normalised(x, HALF), (32, 32), mode="bicubic", antialias=False)
        assert_close(foundation(x), foundation.tokens(resized))
        assert_close(foundation.pooled(x), foundation(x).mean(1))


def test_the_network_is_given_channels_last_pictures():
    foundation = load_foundation(FoundationConfig(name="demo"))
    seen = []
    foundation.tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for size in (64, 32):
        foundation(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    assert len(seen) == 2 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_is_frozen():
    foundation = random_foundation("vit_tiny_patch16_224", image_size=32)
    holder = torch.nn.Module()
    holder.foundation = foundation
    holder.train()
    assert not any(module.training for module in foundation.modules())
    assert not any(parameter.requires_grad for parameter in foundation.parameters())
    assert not foundation(images(32)).requires_grad
    with pytest.raises(TypeError, match="uint8"):
        foundation(images(32).float())


def test_timm_file_loads(tmp_path):
    """With its classifier, at another image size: the head goes, the positions are resampled."""
    torch.manual_seed(0)
    published = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10).eval()
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    same = load_foundation(FoundationConfig(name="vit_tiny_patch16_224", weights=str(tmp_path / "model.safetensors")))
    x = images(224, batch=1)
    with torch.no_grad():
        assert_close(same(x), published.forward_features(normalised(x, HALF))[:, 1:])
    larger = load_foundation(
        FoundationConfig(name="vit_tiny_patch16_224", weights=str(tmp_path / "model.safetensors"), grid_size=16)
    )
    assert larger(images(256, batch=1)).shape == (1, 256, 192)
    expected = timm.layers.resample_abs_pos_embed(published.pos_embed.detach(), [16, 16])
    assert_close(larger.tokens.model.pos_embed, expected)


def test_demo_is_the_vit_its_file_describes():
    """Tokens against the file's tensors put into timm's own modules by hand: stem, positions, blocks, norm."""
    foundation = load_foundation(FoundationConfig(name="demo"))
    with safe_open(DEMO_WEIGHTS, framework="pt") as file:
        arguments = json.loads(file.metadata()["config"])
    assert DEMO_WEIGHTS.stat().st_size <= 2 * 1024**2
    state = {name.removeprefix("vit."): value.float() for name, value in load_file(DEMO_WEIGHTS).items()}
    width, x = arguments["embed_dim"], images(64)
    h = x.float() / 127.5 - 1
    with torch.no_grad():
        for number, stride in enumerate((2, 1, 2, 1, 2, 1, 1)):
            prefix = f"patch_embed.layers.{number}."
            h = F.conv2d(h, state[prefix + "0.weight"], stride=stride, padding=1)
            statistics = [state[f"{prefix}1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
            h = F.relu(F.batch_norm(h, *statistics))
        h = h.flatten(2).transpose(1, 2)  # [B, 64, width]
        h = h + state["pos_embed"]
        for number in range(arguments["depth"]):
            block = timm.models.vision_transformer.Block(
                width,
                arguments["num_heads"],
                qkv_bias=True,
                init_values=1.0,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            ).eval()
            prefix = f"blocks.{number}."
            block.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            h = block(h)
        tokens = F.layer_norm(h, (width,))
    assert_close(foundation(x), tokens, rtol=1e-4, atol=1e-4)
    assert foundation.grid_size == 8 and foundation.dim == width
    assert foundation(x).dtype == torch.float32


@pytest.mark.parametrize("layer", [1, 4, 7, 10, 12])
@pytest.mark.parametrize("grid_size", [8, 9, 16])
def test_squeezenet_gives_the_grid_asked_for(layer, grid_size):
    foundation = random_foundation("squeezenet", layer=layer, grid_size=grid_size)
    dim = {1: 64, 4: 128, 7: 256, 10: 384, 12: 512}[layer]
    assert foundation(images(16, batch=1)).shape == (1, grid_size**2, dim)
    assert (foundation.grid_size, foundation.dim) == (grid_size, dim)


def test_squeezenet_loads_whole_networks_and_features(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    torch.save(network.features.state_dict(), tmp_path / "features.pth")
    x = images(64)
    with torch.no_grad():
        expected = network.features[:8](normalised(x, IMAGENET)).permute(0, 2, 3, 1).flatten(1, 2)
    for name in ("whole.pth", "features.pth"):
        config = FoundationConfig(name="squeezenet", weights=str(tmp_path / name), layer=7, image_size=64)
        assert_close(load_foundation(config)(x), expected)
    save_file({"0.weight": torch.ones(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="does not fit.*0.weight 1 instead of 64x3x3x3"):
        load_foundation(FoundationConfig(name="squeezenet", weights=str(tmp_path / "wrong.safetensors")))


@pytest.mark.skipif("SENDVAE_TEST_DATA" not in os.environ, reason="SENDVAE_TEST_DATA is not set")
def test_real_squeezenet_sees_what_is_in_pictures():
    """With real weights, pictures of one class are nearer to each other than to pictures of other classes."""
    from PIL import Image

    root = Path(os.environ["SENDVAE_TEST_DATA"])
    weights = root / "weights/lpips_squeeze/image_likeness/models/squeeze.backbone.pth"
    foundation = load_foundation(FoundationConfig(name="squeezenet", weights=str(weights), image_size=224))
    folders = sorted((root / "photos/imagenet100x5").iterdir())[::10]
    pictures = [Image.open(path).convert("RGB").resize((224, 224)) for f in folders for path in sorted(f.glob("*.jpg"))]
    x = torch.stack([torchvision.transforms.functional.pil_to_tensor(picture) for picture in pictures])
    features = F.normalize(foundation.pooled(x), dim=1)
    similarity = features @ features.T
    similarity.fill_diagonal_(-1)
    labels = torch.arange(len(folders)).repeat_interleave(5)
    hits = (labels[similarity.argmax(1)] == labels).float().mean().item()
    assert hits > 0.3  # by chance 0.08


def test_grids_that_do_not_match_are_refused():
    foundation = random_foundation("vit_tiny_patch16_224", image_size=32)
    foundation.check_grid(2)
    with pytest.raises(UserError, match="2 x 2 patch tokens.*16 x 16.*grid_size=16"):
        foundation.check_grid(16)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(name="dinov2-vit-b"), "needs its weights.*timm/vit_base_patch14_dinov2.lvd142m"),
        (dict(name="vit_small_patch16_224"), "needs its weights"),
        (dict(name="squeezenet"), "squeezenet1_1-b8a52dc0.pth"),
        (dict(name="dinov2-vit-x"), "did you mean dinov2-vit-"),
        (dict(name="dinov2-vit-b", weights="nowhere.pth"), "nowhere.pth does not exist"),
        (dict(name="demo", weights="nowhere.safetensors"), "nowhere.safetensors"),
        (dict(name="resnet18", random_weights=True), "takes no image size"),
        (dict(name="swin_tiny_patch4_window7_224", random_weights=True), "no plain vision transformer"),
        (dict(name="vit_tiny_patch16_224", random_weights=True, image_size=40), "multiple of 16"),
        (dict(name="squeezenet", random_weights=True, layer=13), "choose 0 to 12"),
        (dict(name="squeezenet", random_weights=True, image_size=17), "at least 18"),
        (dict(name="demo", layer=3), "only for squeezenet"),
        (dict(name="demo", image_size=64, grid_size=8), "give one"),
        (dict(name="demo", grid_size=16), "nothing else"),
        (dict(name="demo", image_size=0), "image_size is 0"),
        (dict(name="demo", random_weights=True, weights="x"), "both set"),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else "",
)
def test_mistakes_get_one_clear_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        load_foundation(FoundationConfig(**options))
    assert "\n" not in str(error.value)
