"""Trains the package's own small frozen foundation model, `models/demo_vit.safetensors`, from nothing.

    python -m sendvae_fast.train.demo_foundation

A timm vision transformer learns the class of freshly rendered scenes. It never sees their attributes: those are what
the demo probes, and training on them would leak the answer. Transformers learn slowly from few pictures, so a small
convolutional teacher learns the classes first (from the same labels only) and the transformer's patch tokens imitate
the teacher's feature map place by place, while the class is read from their mean. The teacher is then thrown away.

The file holds float16 tensors under timm's names and the metadata `config` (JSON: the arguments of
`timm.create_model("vit_tiny_patch16_224", ...)`), `accuracy` (held-out scenes) and `recipe`. Inputs are x / 127.5 - 1.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import Tensor, nn

from sendvae_fast.data.scenes import CLASS_NAMES
from sendvae_fast.data.synthetic import render_scenes
from sendvae_fast.errors import UserError
from sendvae_fast.progress import Progress

WEIGHTS = Path(__file__).parents[1] / "models" / "demo_vit.safetensors"


@dataclass(kw_only=True)
class DemoFoundationRecipe:
    """Sizes and training of the demo foundation model."""

    img_size: int = 64
    """Side of the pictures in pixels."""
    patch_size: int = 8
    """Side of a patch in pixels; the teacher is built for 8."""
    embed_dim: int = 128
    """Width of the transformer, and of the teacher's feature map."""
    depth: int = 4
    """Number of transformer blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    num_scenes: int = 20_000
    """Training scenes rendered; each epoch augments them anew."""
    num_held_out: int = 2_400
    """Scenes of another seed that measure the accuracy."""
    teacher_steps: int = 1_200
    """Optimizer steps of the teacher, of 64 scenes each."""
    num_steps: int = 4_000
    """Optimizer steps of the transformer, of 32 scenes each."""
    teacher_learning_rate: float = 3e-3
    """Peak of the teacher's schedule (linear warm-up over a tenth of the steps, then cosine to zero)."""
    learning_rate: float = 1.5e-3
    """Peak of the transformer's schedule."""
    imitation: float = 2.0
    """Weight of the imitation of the teacher beside the class loss."""
    seed: int = 20
    """Seeds scenes, initial weights, order and augmentation; the held-out scenes take the next seed."""

    def __post_init__(self) -> None:
        for name in ("num_scenes", "num_held_out", "teacher_steps", "num_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"demo_foundation: {name} is {getattr(self, name)}, but must be at least 1")
        if self.patch_size != Teacher.STRIDE:
            raise UserError(f"demo_foundation: patch_size is {self.patch_size}, but the teacher is built for 8")

    def timm_arguments(self) -> dict[str, int | str | bool]:
        """Arguments of `timm.create_model`. Pooling leaves the state dict's names as they are in the stock model."""
        sizes = {name: getattr(self, name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
        return {**sizes, "num_classes": len(CLASS_NAMES), "global_pool": "avg", "fc_norm": False}


class Teacher(nn.Module):
    """A plain convolutional network: a feature map [B, width, S / 8, S / 8] and, from its mean, the class."""

    STRIDE = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        # Even kernels where the stride is 2: they keep the map's cells centred on the patches, odd ones do not.
        plan = [(3, 24, 4), (24, 48, 3), (48, 64, 4), (64, 64, 3), (64, 128, 4), (128, 128, 3), (128, width, 3)]
        layers = [
            nn.Sequential(
                nn.Conv2d(i, o, kernel, 2 if kernel == 4 else 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
            )
            for i, o, kernel in plan
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, len(CLASS_NAMES))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))

    def tokens(self, images: Tensor) -> Tensor:
        """The feature map as [B, N, width] in the transformer's patch order."""
        return self.features(images).flatten(2).transpose(1, 2)


def train_demo_foundation(recipe: DemoFoundationRecipe, output: Path = WEIGHTS) -> float:
    """Train on the CPU, write `output` and return the accuracy on held-out scenes of the weights as written."""
    torch.manual_seed(recipe.seed)
    images, labels, _ = render_scenes(range(recipe.num_scenes), recipe.img_size, recipe.seed)
    scenes = torch.from_numpy(images), torch.from_numpy(labels)
    teacher = train_teacher(recipe, *scenes)
    model = train_student(recipe, teacher, *scenes)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    accuracy = held_out_accuracy(model, recipe)
    metadata = {
        "config": json.dumps(recipe.timm_arguments()),
        "accuracy": f"{accuracy:.4f}",
        "recipe": json.dumps(asdict(recipe)),
    }
    save_file(state, output, metadata=metadata)
    output.chmod(0o644)  # safetensors makes it private
    print(f"wrote {output}: class accuracy {accuracy:.1%} on {recipe.num_held_out} held-out scenes")
    return accuracy


def train_teacher(recipe: DemoFoundationRecipe, images: Tensor, labels: Tensor) -> Teacher:
    """Train the convolutional teacher on images uint8 [B, 3, S, S] and labels int64 [B]."""
    teacher = Teacher(recipe.embed_dim)

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = teacher(augment(images[batch])).float()
        return F.cross_entropy(logits, labels[batch]), _accuracy(logits, labels[batch])

    _fit("training the teacher", teacher, loss, len(images), 64, recipe.teacher_steps, recipe.teacher_learning_rate)
    print(f"teacher: class accuracy {held_out_accuracy(teacher, recipe):.1%} on held-out scenes")
    return teacher.eval().requires_grad_(False)


def train_student(recipe: DemoFoundationRecipe, teacher: Teacher, images: Tensor, labels: Tensor) -> nn.Module:
    """Train the transformer to imitate the teacher's standardised feature map and, through it, to name the class.

    A linear layer maps tokens to features; the teacher's classifier reads their mean. Both are linear, so at the end
    they become the transformer's own classifier.
    """
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **recipe.timm_arguments())
    initialise(model)
    to_features = nn.Linear(recipe.embed_dim, recipe.embed_dim)
    with torch.no_grad():
        sample = torch.cat([teacher.tokens(normalise(part)) for part in images[:1024].split(128)]).flatten(0, 1)
    centre, scale = sample.mean(0), sample.std(0) + 0.05

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        pictures = augment(images[batch])
        with torch.autocast("cpu", torch.bfloat16):
            target = (teacher.tokens(pictures) - centre) / scale
            features = to_features(model.forward_features(pictures)[:, model.num_prefix_tokens:])  # [B, N, width]
        logits = teacher.head(centre + scale * features.float().mean(1))
        imitation = F.mse_loss(features.float(), target.float())
        value = F.cross_entropy(logits, labels[batch]) + recipe.imitation * imitation
        return value, _accuracy(logits, labels[batch])

    trained = nn.ModuleList([model, to_features])
    _fit("training the foundation", trained, loss, len(images), 32, recipe.num_steps, recipe.learning_rate)
    with torch.no_grad():
        model.head.weight.copy_(teacher.head.weight * scale @ to_features.weight)
        model.head.bias.copy_(teacher.head(centre + scale * to_features.bias))
    return model


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Start a timm ViT so that attention looks at near and similar patches, which it otherwise takes long to find.

    Sine-cosine positions, and queries equal to keys, as in "Mimetic initialization of self-attention layers"
    (Trockman and Kolter, 2023).
    """
    width, (rows, columns) = model.embed_dim, model.patch_embed.grid_size
    frequency = torch.logspace(-0.7, 0.3, width // 4)
    row, column = (
        torch.cat([(torch.arange(n)[:, None] * frequency).sin(), (torch.arange(n)[:, None] * frequency).cos()], dim=1)
        for n in (rows, columns)
    )  # [rows, width / 2], [columns, width / 2]
    row, column = row[:, None].expand(rows, columns, -1), column[None].expand(rows, columns, -1)
    model.pos_embed[0, model.num_prefix_tokens:] = torch.cat([row, column], dim=-1).reshape(rows * columns, width)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.view(width, -1))
    for block in model.blocks:
        shared = 1.2 * nn.init.orthogonal_(torch.empty(width, width))
        block.attn.qkv.weight[:width] = block.attn.qkv.weight[width:2 * width] = shared


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
        parts.append(F.pad(part, (margin,) * 4, mode="reflect")[:, :, top:top + size, left:left + size])
    images = torch.cat(parts)
    gain = 1.0 + 0.5 * (torch.rand(len(images), 3, 1, 1) - 0.5)
    offset = 0.4 * (torch.rand(len(images), 3, 1, 1) - 0.5)
    return (images * gain + offset).contiguous(memory_format=torch.channels_last)


def _fit(
    title: str, model: nn.Module, loss: Callable[[Tensor], tuple[Tensor, Tensor]], num_samples: int, batch_size: int,
    num_steps: int, learning_rate: float,
) -> None:
    """AdamW with warm-up and cosine; `loss` takes batch ids and returns (loss, accuracy)."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, num_steps))
    model.train()
    with Progress(title, num_steps, unit="step") as progress:
        for _ in range(num_steps):
            value, accuracy = loss(torch.randint(num_samples, (batch_size,)))
            if not value.isfinite():
                raise UserError(f"demo_foundation: {title}: the loss became {value.item()}; lower the learning rate")
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(1, loss=value.item(), accuracy=accuracy.item())


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()


def _learning_rate_factor(step: int, num_steps: int) -> float:
    warmup = max(num_steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


if __name__ == "__main__":
    auto_cli(train_demo_foundation)
