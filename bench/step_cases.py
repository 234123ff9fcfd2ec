"""The training steps that `python -m bench step` times: the paper's on a GPU, reduced ones on a CPU.

A case is a stage of `sendvae_fast.train` built from the run's own config file, with random weights, and one batch of
random pictures or latents that is already on the device: neither the values of weights nor the source of data change
the work of a step.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from bench.machine import ROOT
from sendvae_fast.config import build_config, merge
from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.reading import read_yaml
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.e2e.stage import E2EStage
from sendvae_fast.train.sit.latent_batches import LatentBatch
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.sit.stage import SiTStage
from sendvae_fast.train.vae.settings import VAETrainConfig
from sendvae_fast.train.vae.stage import VAEStage

NUM_CLASSES = 1000
STAGES = ("vae", "sit", "e2e")
Stage = VAEStage | SiTStage | E2EStage
Config = VAETrainConfig | SiTTrainConfig | E2ETrainConfig
FOUNDATION, LPIPS = "foundation model", "LPIPS"
"""Names of frozen networks."""


@dataclass(frozen=True)
class StepCase:
    """A step to time."""

    stage: str
    name: str
    file: str
    """The run's config, under configs/."""
    settings: dict[str, Any]
    """What is different here."""
    batch_size: int
    latent_shape: tuple[int, ...] = ()
    """Stage 2: the latents [C, H, W]."""

    @property
    def label(self) -> str:
        """The name that `--cases` takes."""
        return f"{self.name}, batch {self.batch_size}"

    def config(self, scratch: Path, engine: dict[str, Any]) -> Config:
        """The run's settings, with random weights in place of published ones."""
        content = merge(read_yaml(ROOT / "configs" / self.file, "restore it"), self.settings)
        content = merge(content, {"run": str(scratch / "run"), "engine": engine})
        random_foundation = {"weights": None, "random_weights": True}
        if self.stage == "sit":
            own = {"latents": str(scratch), "repa": {"foundation": random_foundation}}
            return build_config(SiTTrainConfig, merge(content, own), self.file)
        own: dict[str, Any] = {"init_from": None, "discriminator_from": None}
        if content["loss"].get("perceptual"):
            own["loss"] = {"perceptual": {"weights": str(random_vgg(scratch))}}
        if self.stage == "e2e":
            own["repa"] = {"foundation": random_foundation}
            return build_config(E2ETrainConfig, merge(content, own), self.file)
        own["alignment"] = {"foundation": random_foundation}
        return build_config(VAETrainConfig, merge(content, own), self.file)

    def build(self, scratch: Path, engine: dict[str, Any], distributed: Distributed) -> Stage:
        """The stage, its weights a function of nothing but the case."""
        config: Any = self.config(scratch, engine)
        no_images: Any = None
        torch.manual_seed(0)  # the foundation model's; the stage seeds its own
        if self.stage == "vae":
            return VAEStage(config, no_images, distributed)
        if self.stage == "e2e":
            images: Any = SimpleNamespace(catalog=SimpleNamespace(class_names=["class"] * NUM_CLASSES))
            stage = E2EStage(config, images, distributed)
            fill_zero_layers(stage.generator)
            return stage
        channels = self.latent_shape[0]
        cache = SimpleNamespace(
            rows=SimpleNamespace(shape=self.latent_shape),
            latent_mean=torch.zeros(channels),
            latent_std=torch.ones(channels),
        )
        latents: Any = SimpleNamespace(cache=cache, num_classes=NUM_CLASSES)
        stage = SiTStage(config, latents, distributed)
        fill_zero_layers(stage.engine)
        return stage

    def batch(self, config: Config, device: torch.device) -> ImageBatch | LatentBatch:
        """Random inputs on the device, the same for every form."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.arange(self.batch_size)
        size = config.data.image_size
        images = torch.randint(256, (self.batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(NUM_CLASSES, (self.batch_size,), generator=generator)
        if self.stage != "sit":
            return ImageBatch(0, ids.to(device), images.to(device), labels.to(device))
        mean = torch.randn(self.batch_size, *self.latent_shape, generator=generator)
        return LatentBatch(*(x.to(device) for x in (ids, mean, torch.full_like(mean, 0.1), labels, images)))


def frozen_networks(stage: Stage) -> dict[str, nn.Module]:
    """The frozen networks that a stage has, by name."""
    if isinstance(stage, SiTStage):
        networks = {FOUNDATION: stage.foundation}
    elif isinstance(stage, E2EStage):
        networks = {FOUNDATION: stage.foundation, LPIPS: stage.judge.perceptual}
    else:
        networks = {FOUNDATION: stage.aligner and stage.aligner.foundation, LPIPS: stage.judge.perceptual}
    return {name: network for name, network in networks.items() if network is not None}


def cases_of(stage: str, device: torch.device) -> list[StepCase]:
    """The cases of a stage: on a GPU those of the goals; on a CPU sizes that take seconds a step."""
    vae, e2e = "vae/send_vae_f16d32.yaml", "e2e/va_vae.yaml"
    if device.type == "cuda":
        if stage == "vae":
            return [StepCase("vae", "f16d32 + DINOv2-B, 256 px", vae, {}, 64)]
        if stage == "e2e":
            return [StepCase("e2e", "f16d32 + SiT-XL/1 + DINOv2-B, 256 px", e2e, {}, 32)]  # of 256 on 8 GPUs
        latent = (32, 16, 16)
        return [
            StepCase("sit", f"SiT-{size}/1 + DINOv2-B, 256 px", f"sit/{file}.yaml", {}, batch, latent)
            for size, file in (("XL", "xl_1"), ("B", "b_1")) for batch in (32, 128)
        ]  # fmt: skip
    if stage == "vae":
        # Half the paper's width, so that 128 px and two pictures have as many more activations than weights as it takes
        # for a step to be what it is at 256 px and batch 64: work on maps, not on weights.
        small = {
            "data": {"image_size": 128}, "autoencoder": {"base_channels": 64},
            "alignment": {
                "foundation": {"name": "dinov2-vit-s", "grid_size": 8}, "send": {"width": 384, "num_heads": 6},
            },
        }  # fmt: skip
        case = StepCase("vae", "f16d32 of half width + DINOv2-S, 128 px", vae, small, 2)
    elif stage == "e2e":
        small = {
            "data": {"image_size": 128}, "autoencoder": {"base_channels": 64}, "generator": {"preset": "SiT-S/1"},
            "repa": {"foundation": {"name": "dinov2-vit-s", "grid_size": 8}},
        }  # fmt: skip
        case = StepCase("e2e", "f16d32 of half width + SiT-S/1 + DINOv2-S, 128 px", e2e, small, 2)
    else:
        small = {"generator": {"preset": "SiT-S/1"}, "repa": {"foundation": {"name": "dinov2-vit-s"}}}
        case = StepCase("sit", "SiT-S/1 + DINOv2-S, 256 px", "sit/xl_1.yaml", small, 2, (32, 16, 16))
    # The runs' own bfloat16 first. In float32 a CPU's step is nearly all convolutions and products, alike in all forms.
    return [case, replace(case, settings=merge(small, {"engine": {"precision": "fp32"}}))]


def random_vgg(folder: Path) -> Path:
    """A weight file of VGG16's features, at random."""
    path = folder / "vgg16_features.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(torchvision.models.vgg16(weights=None).features.state_dict(), path)
    return path


@torch.no_grad()
def fill_zero_layers(engine: Engine) -> None:
    """Let the layers that adaLN-Zero starts at zero have weights, so that a wrong block shows in the losses."""
    state = engine.full_state("model")
    generator = torch.Generator().manual_seed(0)

    def filled(weight: Tensor) -> Tensor:
        return 0.02 * torch.randn(weight.shape, generator=generator)

    zero = {name for name, x in state.items() if name.endswith("weight") and not x.any()}
    engine.load_model({name: filled(x) if name in zero else x for name, x in state.items()})
