"""The settings of a feature network: its name and weight file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.inception_file import WHERE_FROM
from sendvae_fast.models.foundation.recipes import recipe_of

DINOV2 = tuple(f"dinov2-vit-{size}" for size in "sblg")
"""The names that stand for FD-DINOv2's features."""
PACKAGED: tuple[str, ...] = ("demo", "judge")
"""Networks whose weights come with the package, both of the demo foundation model's kind."""


@dataclass(kw_only=True)
class FeaturesConfig:
    """The feature network of Fréchet distances and their like. `check` it before any work."""

    name: str = "inception"
    """``inception`` (FID and its like), ``dinov2-vit-{s,b,l,g}`` (FD-DINOv2, whose published numbers are l's), ``demo``
    (the package's own small ViT, which the demo aligns with), ``judge`` (another, with which nothing is aligned), or
    the name of another foundation model."""
    weights: str | None = None
    """Local weight file; ``demo`` and ``judge`` bring their own."""

    @property
    def has_weights(self) -> bool:
        """Whether the weight file is given, or comes with the package."""
        return self.weights is not None or self.name in PACKAGED

    def check(self) -> None:
        """Raise UserError if the name is unknown, or the weight file is not given or not there."""
        if self.name in PACKAGED:
            return
        if difflib.get_close_matches(self.name, ["inception"]) and self.name != "inception":
            raise UserError(f"there are no features {self.name!r}: did you mean inception?")
        if self.name == "inception":
            needed = WHERE_FROM
        else:
            needed = f"fetch {recipe_of(self.name).weight_files}, and give its path with --features.weights"
        if self.weights is None:
            raise UserError(f"features of {self.name} need its weights: {needed}")
        if not Path(self.weights).is_file():
            raise UserError(f"the weights of {self.name} are not at {self.weights}: {needed}")
