"""The settings of a foundation model."""

from __future__ import annotations

from dataclasses import dataclass

from sendvae_fast import checks
from sendvae_fast.errors import UserError


@dataclass(kw_only=True)
class FoundationConfig:
    """The name, weight file and image size of a foundation model.

    Raises `UserError` for a value out of range, and for settings that exclude each other.
    """

    name: str
    """``demo`` (the package's own small ViT), ``squeezenet`` (torchvision's SqueezeNet-1.1 features),
    ``dinov2-vit-{s,b,l,g}``, ``dinov2reg-vit-{s,b,l,g}``, ``dinov3-vit-{s,splus,b,l,hplus,7b}``, ``clip-vit-l``,
    ``ijepa-vit-h``, ``mae-vit-{b,l}``, ``siglip-{b,l,so400m}``, ``siglip2-{b,l,so400m,g}``, or the timm name of any
    vision transformer."""
    weights: str | None = None
    """Local weight file: timm's .safetensors, or the original release's. Only ``demo`` brings its own."""
    image_size: int | None = None
    """Side in pixels to which images are resized; by default 224 for patches of 14, 256 for patches of 16, 64 for
    ``demo`` (which has another network for 32), 224 for ``squeezenet``."""
    grid_size: int | None = None
    """Patch tokens wanted per side, in place of `image_size`, which follows from it. Match it to the latents: 16 for
    images of 256 and f16 latents, 32 for 512."""
    layer: int | None = None
    """``squeezenet`` only: which of its 13 feature modules (0 to 12, default 12) gives the tokens. 4, 7 and 12 give
    128, 256 and 512 channels at 1/4, 1/8 and 1/16 of `image_size`."""
    random_weights: bool = False
    """Leave the network as initialised, without a file. For tests of the machinery: the features mean nothing."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.grid_size is not None:
            raise UserError("foundation image_size and grid_size are both set: give one, the other follows from it")
        checks.at_least(1, self, "image_size", "grid_size", where="foundation")
        if self.layer is not None and self.name != "squeezenet":
            raise UserError(f"foundation layer={self.layer} is only for squeezenet, not for {self.name}: leave it out")
        if self.random_weights and self.weights is not None:
            raise UserError("foundation random_weights and weights are both set: give one")
