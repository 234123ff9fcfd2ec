"""The settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.sampling.settings import GenerateConfig, SamplerConfig


@dataclass(kw_only=True)
class DemoConfig:
    """How much of everything."""

    run: str = "runs/demo"
    """Folder of the demo; the same command again goes on in it."""
    data: str | None = None
    """Your own photographs, anything `Catalog.open` takes; without it the demo renders scenes with known attributes."""
    methods: list[str] = field(default_factory=lambda: ["plain", "control", "send"])
    """The autoencoders: of plain, control, send, va, reals and e2e; more may be added later."""
    seed: int = 0
    """Seed of training and sampling; the rendered scenes stay the same."""
    image_size: Literal[32, 64] = 32
    """Side of the pictures in pixels; at 64 there are four times as many pixels, and latents, to work on."""
    num_train_images: int = 6000
    """Rendered scenes to train on."""
    num_test_images: int = 2000
    """Rendered scenes held out for evaluation."""
    vae_steps: int | None = None
    """Steps of the plain autoencoder; 0 takes the one that comes with the package, which has had 6,000 on other scenes.
    By default 0 on scenes of 32 px, else 3,000."""
    finetune_steps: int = 1200
    """Steps of each fine-tuning."""
    generator_steps: int = 2000
    """Steps of each SiT."""
    foundation: FoundationConfig = field(default_factory=lambda: FoundationConfig(name="demo"))
    """The frozen foundation model to align with."""
    features: FeaturesConfig = field(default_factory=lambda: FeaturesConfig(name="judge"))
    """The network of the Fréchet distances."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and weights, for the table; without it LPIPS is not measured."""
    generate: GenerateConfig = field(
        default_factory=lambda: GenerateConfig(
            num_samples=2400,
            batch_size=240,
            guidance_scale=1.0,
            labels="equal",
            sampler=SamplerConfig(kind="heun", num_steps=8, dtype="float32"),
        )
    )
    """How pictures are drawn."""

    def __post_init__(self) -> None:
        checks.choices(self)
        checks.weight_paths(self, "run")
        checks.seeds(self, "seed")
        checks.at_least(1, self, "num_train_images", "num_test_images", "finetune_steps", "generator_steps")
        checks.at_least(0, self, "vae_steps", hint=" (0 trains none)")

    @property
    def plain_steps(self) -> int:
        """Steps of the plain autoencoder, 0 where it is not trained."""
        if self.vae_steps is not None:
            return self.vae_steps
        return 0 if self.data is None and self.image_size == 32 else 3000
