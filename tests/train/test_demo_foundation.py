import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sendvae_fast.data.scenes.scene_folder import render_scenes
from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS, ConvStem, DemoViT
from sendvae_fast.train.demo_foundation import (
    DemoFoundationRecipe,
    augment,
    normalise,
    train_demo_foundation,
)

pytestmark = pytest.mark.slow

TINY = {
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "num_scenes": 48,
    "num_held_out": 24,
    "num_steps": 2,
    "batch_size": 8,
}


def load(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    model = DemoViT(**json.loads(metadata["config"]))
    model.load_state_dict(load_file(path), strict=True)
    return model.eval(), metadata


def test_the_recipe_runs_and_its_file_loads(tmp_path):
    recipe = DemoFoundationRecipe(**TINY)
    accuracy = train_demo_foundation(recipe, tmp_path / "vit.safetensors")
    model, metadata = load(tmp_path / "vit.safetensors")
    assert 0.0 <= accuracy <= 1.0 and float(metadata["accuracy"]) == pytest.approx(accuracy, abs=1e-4)
    assert json.loads(metadata["recipe"])["num_steps"] == 2
    floats = [tensor for tensor in load_file(tmp_path / "vit.safetensors").values() if tensor.is_floating_point()]
    assert floats and all(tensor.dtype == torch.float16 for tensor in floats)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_committed_model_knows_fresh_scenes():
    assert DEMO_WEIGHTS.stat().st_size <= 2 * 2**20
    model, metadata = load(DEMO_WEIGHTS)
    images, labels, _ = render_scenes(range(240), seed=999)
    with torch.no_grad():
        predicted = model(normalise(torch.from_numpy(images))).argmax(-1)
    accuracy = (predicted == torch.from_numpy(labels)).float().mean().item()
    assert accuracy > 0.7 and abs(accuracy - float(metadata["accuracy"])) < 0.12  # 4 deviations of 240 draws


def test_stem_cells_lie_on_the_patches():
    """What a changed patch changes is centred on it. The next cell over, half a patch away, would fail."""
    torch.manual_seed(0)
    stem = ConvStem(img_size=64, patch_size=8, in_chans=3, embed_dim=64).eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        blank = stem(image)
        image[:, :, 16:24, 32:40] = 1.0  # patch row 2, column 4
        change = (stem(image) - blank).square().sum(-1).reshape(8, 8)
    cells = torch.arange(8.0)
    assert abs(float((change.sum(1) * cells).sum() / change.sum()) - 2) < 0.2
    assert abs(float((change.sum(0) * cells).sum() / change.sum()) - 4) < 0.2


def test_augmentation_keeps_range_and_varies():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(8, -1, -1, -1)
    first, second = augment(images), augment(images)
    assert first.shape == (8, 3, 32, 32) and first.dtype == torch.float32
    assert first.abs().max() <= 1.0 * 1.25 + 0.2 and not torch.equal(first, second)


def test_errors():
    with pytest.raises(UserError, match="num_steps is 0"):
        DemoFoundationRecipe(num_steps=0)
    with pytest.raises(ValueError, match="patches of 8"):
        ConvStem(img_size=64, patch_size=4, in_chans=3, embed_dim=8)
