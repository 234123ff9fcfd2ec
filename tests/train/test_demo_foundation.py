import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sendvae_fast.data.scenes import CLASS_NAMES
from sendvae_fast.data.synthetic import render_scenes
from sendvae_fast.errors import UserError
from sendvae_fast.train.demo_foundation import (
    WEIGHTS,
    DemoFoundationRecipe,
    Teacher,
    augment,
    initialise,
    normalise,
    train_demo_foundation,
)

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_scenes": 48, "num_held_out": 24, "teacher_steps": 2,
        "num_steps": 2}


def load(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **json.loads(metadata["config"]))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=True)
    return model.eval(), metadata


def test_the_recipe_runs_and_its_file_loads(tmp_path):
    recipe = DemoFoundationRecipe(**TINY)
    accuracy = train_demo_foundation(recipe, tmp_path / "vit.safetensors")
    model, metadata = load(tmp_path / "vit.safetensors")
    assert 0.0 <= accuracy <= 1.0 and float(metadata["accuracy"]) == pytest.approx(accuracy, abs=1e-4)
    assert json.loads(metadata["recipe"])["num_steps"] == 2
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "vit.safetensors").values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_committed_model_knows_fresh_scenes():
    assert WEIGHTS.stat().st_size <= 2 * 2**20
    model, metadata = load(WEIGHTS)
    images, labels, _ = render_scenes(range(240), seed=999)
    with torch.no_grad():
        predicted = model(normalise(torch.from_numpy(images))).argmax(-1)
    accuracy = (predicted == torch.from_numpy(labels)).float().mean().item()
    assert accuracy > float(metadata["accuracy"]) - 0.12  # 4 standard deviations of 240 draws


def test_teacher_tokens_lie_on_the_patches():
    """What a changed patch changes is centred on it. The next cell over, half a patch away, would fail."""
    torch.manual_seed(0)
    teacher = Teacher(64).eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        blank = teacher.tokens(image)
        image[:, :, 16:24, 32:40] = 1.0  # patch row 2, column 4
        change = (teacher.tokens(image) - blank).square().sum(-1).reshape(8, 8)
    assert teacher(image).shape == (1, len(CLASS_NAMES))
    cells = torch.arange(8.0)
    assert abs(float((change.sum(1) * cells).sum() / change.sum()) - 2) < 0.2
    assert abs(float((change.sum(0) * cells).sum() / change.sum()) - 4) < 0.2


def test_attention_starts_local():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **DemoFoundationRecipe(depth=1).timm_arguments())
    initialise(model)
    with torch.no_grad():
        tokens = model.blocks[0].norm1(model.pos_embed)
        query, key, _ = model.blocks[0].attn.qkv(tokens)[0, 1:].chunk(3, dim=-1)
        nearness = (query @ key.T)[3 * 8 + 4].reshape(8, 8)
    assert divmod(int(nearness.argmax()), 8) == (3, 4)
    assert nearness[3, 5] > nearness[3, 7] and nearness[4, 4] > nearness[7, 4]


def test_augmentation_keeps_range_and_varies():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(8, -1, -1, -1)
    first, second = augment(images), augment(images)
    assert first.shape == (8, 3, 32, 32) and first.dtype == torch.float32
    assert first.abs().max() <= 1.0 * 1.25 + 0.2 and not torch.equal(first, second)


def test_errors():
    with pytest.raises(UserError, match="num_steps is 0"):
        DemoFoundationRecipe(num_steps=0)
    with pytest.raises(UserError, match="patch_size is 4"):
        DemoFoundationRecipe(patch_size=4)
