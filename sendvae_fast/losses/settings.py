"""The settings of LPIPS."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.errors import UserError

BACKBONE_FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


@dataclass(kw_only=True)
class PerceptualConfig:
    """The LPIPS network, if any. Raises `UserError` for an unknown network."""

    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Backbone: ``vgg`` for training (REPA-E, LDM)."""
    weights: str
    """Local file of torchvision's ImageNet weights of the backbone (vgg16, alexnet or squeezenet1_1), whole network or
    features alone."""
    heads: str | None = None
    """Local file of the v0.1 linear heads; by default those that come with the lpips package."""
    legacy_range: bool = False
    """Give the network 2x - 1 of pictures that are already in [-1, 1], hence in [-3, 1], as REPA-E did until July 2025
    (its pull request 17). Only to repeat such a run."""
    random_weights: bool = field(default=False, metadata={checks.ADDED_LATER: True})
    """Leave network and heads as initialised and read no file. For tests of the machinery: the distance means
    nothing."""

    def __post_init__(self) -> None:
        checks.choices(self, where="perceptual")

    def check(self) -> None:
        """Raise UserError if a weight file is not there, before anything is loaded."""
        file = BACKBONE_FILES[self.net]
        if not Path(self.weights).is_file():
            raise UserError(
                f"LPIPS-{self.net}'s weights are not at {self.weights}: fetch "
                f"https://download.pytorch.org/models/{file} (its sha256 begins with {file[-12:-4]}), and give its "
                "path with --perceptual.weights"
            )
        if self.heads is not None and not Path(self.heads).is_file():
            raise UserError(f"LPIPS' heads are not at {self.heads}: leave --perceptual.heads out, they come with lpips")
