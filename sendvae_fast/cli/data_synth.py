"""Render a JPEG ImageFolder of scenes whose every picture has known binary attributes and a class.

    sendvae data synth scenes/train --num_images=4000

Writes FOLDER/<class>/<id>.jpg and FOLDER/attributes.csv. The same arguments again do nothing.
"""

from dataclasses import dataclass

from sendvae_fast import checks
from sendvae_fast.data.scenes.scene_folder import synth_scenes

POSITIONAL = "folder"


@dataclass(kw_only=True)
class Config:
    """The scenes to render."""

    folder: str
    """Folder to write."""
    num_images: int = 4000
    """Pictures."""
    size: int = 64
    """Side in pixels."""
    seed: int = 0
    """Every picture is a function of (seed, id)."""

    def __post_init__(self) -> None:
        checks.paths(self, "folder")
        checks.seeds(self, "seed")


def run(config: Config) -> None:
    """Render the folder."""
    synth_scenes(config.folder, config.num_images, config.size, config.seed)
