"""The demo's settings, and the configs of the ordinary runs and jobs that it consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sendvae_fast import checks
from sendvae_fast.config import CONFIGS, build_config, merge, read_config
from sendvae_fast.engine.run import plain
from sendvae_fast.losses.perceptual import PerceptualConfig
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.precision import computes_bf16
from sendvae_fast.sampling.generate import GenerateConfig
from sendvae_fast.sampling.sample_to_folder import SampleConfig
from sendvae_fast.sampling.samplers import SamplerConfig
from sendvae_fast.train.cache_latents import CacheConfig
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.settings import VAETrainConfig


@dataclass(frozen=True)
class Plan:
    """One way of training the autoencoder."""

    key: str
    name: str
    description: str
    config: str


PLANS = (
    Plan("plain", "Plain VAE", "The starting point: no alignment, no fine-tuning.", "vae.yaml"),
    Plan("control", "Control", "The plain VAE fine-tuned without alignment, for as many steps.", "vae_control.yaml"),
    Plan("send", "Send-VAE", "The plain VAE fine-tuned with alignment through noise and mapper.", "vae_send.yaml"),
)


@dataclass(kw_only=True)
class DemoConfig:
    """How much of everything."""

    run: str = "runs/demo"
    """Folder of the demo; the same command again goes on in it."""
    data: str | None = None
    """Your own photographs, anything `Catalog.open` takes; without it the demo renders scenes with known attributes."""
    seed: int = 0
    """Seed of training and sampling; the rendered scenes stay the same."""
    num_train_images: int = 3000
    """Rendered scenes to train on."""
    num_test_images: int = 600
    """Rendered scenes held out for evaluation."""
    vae_steps: int = 500
    """Steps of the plain autoencoder."""
    finetune_steps: int = 700
    """Steps of each fine-tuning."""
    generator_steps: int = 600
    """Steps of each SiT."""
    foundation: FoundationConfig = field(default_factory=lambda: FoundationConfig(name="demo"))
    """The frozen foundation model, for alignment, REPA and the Fréchet distances."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and weights, for the table; without it LPIPS is not measured."""
    generate: GenerateConfig = field(
        default_factory=lambda: GenerateConfig(
            num_samples=2000,
            batch_size=100,
            precision="bf16" if computes_bf16() else "tf32",
            guidance_scale=2.0,
            guidance_interval=(0.0, 0.8),
            labels="equal",
            sampler=SamplerConfig(num_steps=20),
        )
    )
    """How pictures are drawn."""

    def __post_init__(self) -> None:
        checks.weight_paths(self, "run")
        checks.seeds(self, "seed")
        checks.at_least(
            1, self, "num_train_images", "num_test_images", "vae_steps", "finetune_steps", "generator_steps"
        )


def image_size() -> int:
    """Side of the demo's pictures."""
    return read_config(CONFIGS / "demo" / "vae.yaml")["data"]["image_size"]


def vae_config(config: DemoConfig, plan: Plan, root: Path, train_data: Path) -> VAETrainConfig:
    """Stage 1 of a plan: the plain autoencoder from scratch, the others from it."""
    is_plain = plan.key == "plain"
    settings: dict[str, Any] = {
        "run": str(root / plan.key / "vae"),
        "seed": config.seed,
        "data": {"root": str(train_data)},
        "loop": {"num_steps": config.vae_steps if is_plain else config.finetune_steps},
        "alignment": {"foundation": plain(config.foundation)},
    }
    if not is_plain:
        settings["init_from"] = str(root / "plain" / "vae")
    return build_config(VAETrainConfig, merge(read_config(CONFIGS / "demo" / plan.config), settings), plan.config)


def cache_config(plan: Plan, root: Path, train_data: Path) -> CacheConfig:
    """The latent cache of a plan."""
    return CacheConfig(
        out=str(root / plan.key / "latents"),
        autoencoder=str(root / plan.key / "vae"),
        data=str(train_data),
        image_size=image_size(),
    )


def sit_config(config: DemoConfig, plan: Plan, root: Path, train_data: Path) -> SiTTrainConfig:
    """Stage 2 of a plan: the same for all but for the latents."""
    settings = {
        "run": str(root / plan.key / "sit"),
        "seed": config.seed,
        "data": {"root": str(train_data)},
        "latents": str(root / plan.key / "latents"),
        "autoencoder": str(root / plan.key / "vae"),
        "loop": {"num_steps": config.generator_steps},
        "repa": {"foundation": plain(config.foundation)},
    }
    return build_config(SiTTrainConfig, merge(read_config(CONFIGS / "demo" / "sit.yaml"), settings), "sit.yaml")


def sample_config(config: DemoConfig, plan: Plan, root: Path) -> SampleConfig:
    """The samples of a plan."""
    settings = {
        "generator": str(root / plan.key / "sit"),
        "autoencoder": str(root / plan.key / "vae"),
        "out": str(root / plan.key / "generated"),
        "seed": config.seed,
    }
    return build_config(SampleConfig, merge(plain(config.generate), settings), "the demo's samples")
