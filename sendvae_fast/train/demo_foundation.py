"""Trains the package's own small frozen foundation model, `models/foundation/demo_vit.safetensors`, from nothing.

    python -m sendvae_fast.train.demo_foundation

A small vision transformer (`models.foundation.demo_vit`) learns the class of freshly rendered scenes. It never sees
their attributes: those are what the demo probes, and training on them would leak the answer.

The file holds float16 tensors and the metadata `config` (JSON: the arguments of `DemoViT`), `accuracy` (on held-out
scenes) and `recipe`. Inputs are x / 127.5 - 1.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from sendvae_fast import checks
from sendvae_fast.data.scenes.scene import CLASS_NAMES
from sendvae_fast.data.scenes.scene_folder import render_scenes
from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS, DemoViT
from sendvae_fast.progress import Progress


@dataclass(kw_only=True)
class DemoFoundationRecipe:
    """Sizes and training of the demo foundation model. Raises `UserError` for a value out of range."""

    img_size: int = 64
    """Side of the pictures in pixels."""
    embed_dim: int = 128
    """Width of the transformer."""
    depth: int = 2
    """Transformer blocks on top of the convolutional stem."""
    num_heads: int = 4
    """Attention heads per block."""
    num_scenes: int = 16_000
    """Training scenes rendered; every batch augments them anew."""
    num_held_out: int = 2_400
    """Scenes of another seed that measure the accuracy."""
    num_steps: int = 2_400
    """Optimizer steps."""
    batch_size: int = 64
    """Scenes per step."""
    learning_rate: float = 3e-3
    """Peak of the schedule (linear warm-up over a tenth of the steps, then cosine to zero)."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay."""
    seed: int = 20
    """Seeds scenes, initial weights, order and augmentation; the held-out scenes take the next seed."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "num_scenes", "num_held_out", "num_steps", "batch_size", where="demo_foundation")
        checks.seeds(self, "seed", where="demo_foundation")

    def model_arguments(self) -> dict[str, int]:
        """Arguments of `DemoViT`."""
        sizes = {name: getattr(self, name) for name in ("img_size", "embed_dim", "depth", "num_heads")}
        return {**sizes, "num_classes": len(CLASS_NAMES)}


def train_demo_foundation(recipe: DemoFoundationRecipe, output: Path = DEMO_WEIGHTS) -> float:
    """Train on the CPU, write `output` and return the accuracy on held-out scenes of the weights as written."""
    torch.manual_seed(recipe.seed)
    images, labels, _ = render_scenes(range(recipe.num_scenes), recipe.img_size, recipe.seed)
    model = DemoViT(**recipe.model_arguments()).to(memory_format=torch.channels_last)
    fit(model, torch.from_numpy(images), torch.from_numpy(labels), recipe)
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    accuracy = held_out_accuracy(model, recipe)
    metadata = {
        "config": json.dumps(recipe.model_arguments()),
        "accuracy": f"{accuracy:.4f}",
        "recipe": json.dumps(asdict(recipe)),
    }
    save_tensors(output, state, metadata)
    print(f"wrote {output}: class accuracy {accuracy:.1%} on {recipe.num_held_out} held-out scenes")
    return accuracy


def fit(model: nn.Module, images: Tensor, labels: Tensor, recipe: DemoFoundationRecipe) -> None:
    """Train `model` on images uint8 [N, 3, S, S] and labels int64 [N], in bfloat16 autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, recipe.num_steps))
    model.train()
    with Progress("training the foundation", recipe.num_steps, unit="step") as progress:
        for _ in range(recipe.num_steps):
            batch = torch.randint(len(images), (recipe.batch_size,))
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augment(images[batch])).float()
            loss = F.cross_entropy(logits, labels[batch])
            if not loss.isfinite():
                raise UserError(f"demo_foundation: the loss became {loss.item()}; lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            accuracy = (logits.argmax(-1) == labels[batch]).float().mean().item()
            progress.advance(1, loss=loss.item(), accuracy=accuracy)


@torch.no_grad()
def held_out_accuracy(model: nn.Module, recipe: DemoFoundationRecipe) -> float:
    """Share of the held-out scenes (those of seed + 1) whose class `model` finds."""
    images, labels, _ = render_scenes(range(recipe.num_held_out), recipe.img_size, recipe.seed + 1)
    model.eval()
    predicted = torch.cat([model(normalise(part)).argmax(-1) for part in torch.from_numpy(images).split(256)])
    return (predicted == torch.from_numpy(labels)).float().mean().item()


def normalise(images: Tensor) -> Tensor:
    """Bring uint8 images to the model's input range [-1, 1]."""
    return images.float() / 127.5 - 1.0


def augment(images: Tensor) -> Tensor:
    """Randomly turn, mirror, shift and recolour uint8 images [B, 3, S, S]; returns float32 in about [-1, 1].

    None of it changes the class. Turns and shifts are drawn once per batch quarter: over thousands of steps that is as
    good as once per picture, and several times cheaper.
    """
    parts = []
    for part in normalise(images).chunk(4):
        part = torch.rot90(part, int(torch.randint(4, ())), (2, 3))
        if torch.rand(()) < 0.5:
            part = part.flip(3)
        size, margin = part.shape[-1], part.shape[-1] // 10
        top, left = torch.randint(2 * margin + 1, (2,)).tolist()
        parts.append(F.pad(part, (margin,) * 4, mode="reflect")[:, :, top : top + size, left : left + size])
    images = torch.cat(parts)
    gain = 1.0 + 0.5 * (torch.rand(len(images), 3, 1, 1) - 0.5)
    offset = 0.4 * (torch.rand(len(images), 3, 1, 1) - 0.5)
    return (images * gain + offset).contiguous(memory_format=torch.channels_last)


def _learning_rate_factor(step: int, num_steps: int) -> float:
    warmup = max(num_steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


if __name__ == "__main__":
    auto_cli(train_demo_foundation)
