"""The demo: the smallest comparison, everything the project does, end to end, small enough for two CPU cores.

A plain autoencoder; the same fine-tuned without alignment (control), and for as many steps with it (Send-VAE), or by
other methods; a latent cache, a SiT, samples and numbers of each; one page. On scenes the plain autoencoder is the one
that comes with the package, as the paper starts from a published one; photographs get one of their own.
"""

from __future__ import annotations

from sendvae_fast.compare.compare import run_comparison
from sendvae_fast.compare.plan import Comparison
from sendvae_fast.compare.settings import CompareConfig, unknown_method
from sendvae_fast.config import CONFIGS, build_config, merge, plain, read_config
from sendvae_fast.demo.settings import DemoConfig
from sendvae_fast.models.foundation.foundation_config import FoundationConfig

SETTINGS = CONFIGS / "compare" / "scenes.yaml"
"""The comparison whose methods and networks the demo has."""


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
