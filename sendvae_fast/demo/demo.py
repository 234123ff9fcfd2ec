"""The demo: the smallest comparison, everything the project does, end to end, small enough for two CPU cores.

A plain autoencoder; the same fine-tuned without alignment (control), and for as many steps with it (Send-VAE), or by
other methods; a latent cache, a SiT, samples and numbers of each; one page. On scenes the plain autoencoder is the one
that comes with the package, as the paper starts from a published one; photographs get one of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.compare.compare import run_comparison
from sendvae_fast.compare.plan import Comparison
from sendvae_fast.compare.settings import CompareConfig, unknown_method
from sendvae_fast.config import CONFIGS, build_config, merge, read_config
from sendvae_fast.engine.run import plain
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.losses.perceptual import PerceptualConfig
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.sampling.generate import GenerateConfig
from sendvae_fast.sampling.samplers import SamplerConfig

SETTINGS = CONFIGS / "compare" / "scenes.yaml"
"""The comparison whose methods and networks the demo has."""


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


def comparison_of(config: DemoConfig) -> Comparison:
    """The demo as a comparison. UserError for a method that it does not have."""
    content = read_config(SETTINGS)
    known = [method["key"] for method in content["methods"]]
    for key in config.methods:
        if key not in known:
            raise unknown_method("--methods names", key, known)
    for method in content["methods"]:
        if "start" in method:
            method["settings"] = {"loop": {"num_steps": config.finetune_steps}}
        elif num_steps := config.plain_steps:
            method |= {"weights": None, "config": "demo/vae", "settings": {"loop": {"num_steps": num_steps}}}
    foundation = plain(config.foundation)
    if config.foundation == FoundationConfig(name="demo"):
        foundation["image_size"] = config.image_size
    settings = {
        "run": config.run,
        "title": "sendvae_fast demo",
        "only": config.methods,
        "seeds": [config.seed],
        "pictures": {
            "data": config.data,
            "image_size": config.image_size,
            "num_train_images": config.num_train_images,
            "num_test_images": config.num_test_images,
        },
        "foundation": foundation,
        "features": plain(config.features),
        "generator_settings": {"loop": {"num_steps": config.generator_steps}},
        "curve_every": None,
        "samples": plain(config.generate),
        "perceptual": plain(config.perceptual),
    }
    return Comparison(
        build_config(CompareConfig, merge(content, settings), "the demo"), plain(config), in_one_folder=True
    )


def run_demo(config: DemoConfig) -> int:
    """Run or finish the demo; returns the exit code.

    Raises:
        UserError: the folder holds a demo with other settings, or the user's photographs are too few.
    """
    return run_comparison(comparison_of(config), may_change=("methods",))
