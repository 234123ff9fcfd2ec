"""Makes the small frozen networks of the CPU study: foundation models to align with, and the judge of the pictures.

    python -m bench.evidence.networks [NAME ...]

All are `DemoViT`s of 32 px scenes, whose tokens are the grid of the study's latents. They are trained on scenes of
seeds of their own, in fp32 on one thread. The first and the last are the demo's as well and come with the package, the
others lie in bench/evidence/weights; so every machine measures with the same ones, and a file that is there is left
alone.

    supervised        learns the class of a scene, never its attributes: those are what is probed
    strong            the same, for four times as long on twice as many scenes
    self_supervised   learns no label at all: two views of a scene agree, those of two scenes do not (SimCLR's loss,
                      Chen et al., ICML 2020)
    random            as initialised: what a fixed target does that knows nothing
    judge             learns classes and attributes, and nothing is ever aligned with it
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.evidence.study import WEIGHTS
from sendvae_fast.data.scenes.scene import ATTRIBUTES, CLASS_NAMES
from sendvae_fast.data.scenes.scene_folder import render_scenes
from sendvae_fast.files import save_tensors
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS_32, JUDGE_WEIGHTS, DemoViT
from sendvae_fast.progress import Progress
from sendvae_fast.train.demo_foundation import augment, normalise

TEMPERATURE = 0.2
"""Of SimCLR's softmax over cosines."""
BRIGHTER = 0.2
"""How far the judge's training changes each channel's gain: colours matter to it, so less than in `augment`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network and its training."""

    task: Literal["classes", "views", "none", "classes and attributes"]
    num_outputs: int
    """Of the head, which the foundation models' users never see."""
    seed: int
    """Of weights, scenes and order; held-out scenes take the next one."""
    img_size: int = 32
    embed_dim: int = 128
    depth: int = 2
    num_heads: int = 4
    num_scenes: int = 6_000
    num_held_out: int = 1_200
    num_steps: int = 900
    batch_size: int = 48
    learning_rate: float = 3e-3

    def model(self) -> DemoViT:
        """The network as initialised."""
        torch.manual_seed(self.seed)
        return DemoViT(**self.sizes())

    def sizes(self) -> dict[str, int]:
        """Arguments of `DemoViT`."""
        names = ("img_size", "embed_dim", "depth", "num_heads")
        return {name: getattr(self, name) for name in names} | {"num_classes": self.num_outputs}


RECIPES = {
    "supervised": Recipe(task="classes", num_outputs=len(CLASS_NAMES), seed=40),
    "strong": Recipe(task="classes", num_outputs=len(CLASS_NAMES), seed=80, num_scenes=12_000, num_steps=3_600),
    "self_supervised": Recipe(task="views", num_outputs=64, seed=50),
    "random": Recipe(task="none", num_outputs=len(CLASS_NAMES), seed=60, num_steps=0),
    "judge": Recipe(
        task="classes and attributes", num_outputs=len(CLASS_NAMES) + len(ATTRIBUTES), seed=70, embed_dim=64
    ),
}


FILES = {name: WEIGHTS / f"{name}.safetensors" for name in RECIPES} | {
    "supervised": DEMO_WEIGHTS_32,
    "judge": JUDGE_WEIGHTS,
}
"""Where each of them lies."""


def make_missing(paths: Iterable[str | None]) -> None:
    """Train those of the study's networks that are named and not there; other files are the user's."""
    for name, path in FILES.items():
        if str(path) in paths:
            make_network(path, RECIPES[name])


def make_network(path: Path, recipe: Recipe) -> None:
    """Train a network and write its file, unless that is there."""
    if path.is_file():
        return
    model = recipe.model().to(memory_format=torch.channels_last)
    scores = train(model, recipe) if recipe.num_steps else {}
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    metadata = {
        "config": json.dumps(recipe.sizes()), "recipe": json.dumps(asdict(recipe)), "scores": json.dumps(scores),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, state, metadata)
    print(f"wrote {path}: {scores}")


def train(model: DemoViT, recipe: Recipe) -> dict[str, float]:
    """Train by AdamW with a cosine schedule; returns scores on held-out scenes."""
    images, labels, attributes = (torch.from_numpy(part) for part in scenes(recipe.num_scenes, recipe, recipe.seed))
    loss_of = LOSSES[recipe.task]
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.05)
    warmup = max(recipe.num_steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / recipe.num_steps)),
    )
    model.train()
    with Progress(f"training, {recipe.task}", recipe.num_steps, unit="step") as progress:
        for _ in range(recipe.num_steps):
            batch = torch.randint(len(images), (recipe.batch_size,))
            loss = loss_of(model, images[batch], labels[batch], attributes[batch].float())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(1, loss=loss.item())
    return held_out_scores(model.eval(), recipe)


def scenes(num: int, recipe: Recipe, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rendered scenes: pictures, classes, attributes."""
    return render_scenes(range(num), recipe.img_size, seed, num_workers=1)


def _class_loss(model: DemoViT, images: Tensor, labels: Tensor, attributes: Tensor) -> Tensor:
    return F.cross_entropy(model(augment(images)), labels)


def _judge_loss(model: DemoViT, images: Tensor, labels: Tensor, attributes: Tensor) -> Tensor:
    """No turns or mirrors: they would change where the object is and where light comes from."""
    gain = 1.0 + BRIGHTER * (torch.rand(len(images), 3, 1, 1) - 0.5)
    logits = model((normalise(images) * gain).contiguous(memory_format=torch.channels_last))
    classes, binary = logits.split([len(CLASS_NAMES), len(ATTRIBUTES)], dim=1)
    return F.cross_entropy(classes, labels) + F.binary_cross_entropy_with_logits(binary, attributes)


def _view_loss(model: DemoViT, images: Tensor, labels: Tensor, attributes: Tensor) -> Tensor:
    """SimCLR: of 2 B views, each must find the other one of its scene."""
    views = F.normalize(model(torch.cat([augment(images), augment(images)])), dim=1)
    cosines = views @ views.T / TEMPERATURE
    cosines.fill_diagonal_(-math.inf)
    return F.cross_entropy(cosines, torch.arange(len(views)).roll(len(images)))


LOSSES: dict[str, Callable[[DemoViT, Tensor, Tensor, Tensor], Tensor]] = {
    "classes": _class_loss,
    "views": _view_loss,
    "classes and attributes": _judge_loss,
}


@torch.no_grad()
def held_out_scores(model: DemoViT, recipe: Recipe) -> dict[str, float]:
    """Accuracy on held-out scenes, of classes and of attributes (mean over them), where the network tells them."""
    images, labels, attributes = (
        torch.from_numpy(part) for part in scenes(recipe.num_held_out, recipe, recipe.seed + 1)
    )
    if recipe.task == "views":
        return {}
    logits = torch.cat([model(normalise(part)) for part in images.split(200)])
    classes = logits[:, : len(CLASS_NAMES)].argmax(dim=1)
    scores = {"class_accuracy": float((classes == labels).float().mean())}
    if recipe.task == "classes and attributes":
        found = logits[:, len(CLASS_NAMES) :] > 0
        scores["attribute_accuracy"] = float((found == attributes).float().mean())
    return scores


if __name__ == "__main__":
    torch.set_num_threads(1)
    for network_name in sys.argv[1:] or RECIPES:
        make_network(FILES[network_name], RECIPES[network_name])
