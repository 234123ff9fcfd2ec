"""Sizes and switches of a `SiT`, and the published ones by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sendvae_fast import checks
from sendvae_fast.errors import UserError

_SIZES = {
    "S": dict(depth=12, width=384, num_heads=6),
    "B": dict(depth=12, width=768, num_heads=12),
    "L": dict(depth=24, width=1024, num_heads=16),
    "XL": dict(depth=28, width=1152, num_heads=16),
    "1p0B": dict(depth=24, width=1536, num_heads=24),
    "1p6B": dict(depth=28, width=1792, num_heads=28),
}

NUM_HEADS = {size["width"]: size["num_heads"] for size in _SIZES.values()}
"""Attention heads of every published width: the shapes of published weights do not tell them."""

NO_REPA = (
    "REPA aligns tokens with the patches of a picture that they stand for, and these latents are a sequence of tokens "
    "that stand for no patch: set repa.weight=0"
)

_LIGHTNING = dict(swiglu=True, rms_norm=True, rope=True)
"""LightningDiT's switches in all of its published models; its name is otherwise only a size."""

PRESETS: dict[str, dict[str, Any]] = {
    **{
        f"SiT-{size}/{patch}": dict(patch_size=patch, **_SIZES[size])
        for size in ("S", "B", "L", "XL") for patch in (1, 2, 4, 8)
    },
    **{
        f"LightningDiT-{size}/{patch}": dict(patch_size=patch, **_SIZES[size], **_LIGHTNING)
        for size in ("B", "L", "XL", "1p0B", "1p6B") for patch in (1, 2)
    },
    **{
        f"DiT-{size}/{patch}": dict(patch_size=patch, **_SIZES[size], diffusion=True)
        for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)
    },
}  # fmt: skip
"""Patch size, sizes and switches by published name."""


DIFFUSION_STEPS = 1000
"""Steps of noise that a DiT is trained on."""


def preset_sizes(name: str) -> dict[str, Any]:
    """The fields of `SiTConfig` that a published name stands for; `UserError` with the nearest name for another one."""
    if name not in PRESETS:
        lower_case = {known.lower(): known for known in PRESETS}
        near = lower_case[difflib.get_close_matches(name.lower(), lower_case, n=1, cutoff=0.0)[0]]
        raise UserError(
            f"unknown SiT preset {name!r}, did you mean {near!r}? There are SiT-{{S,B,L,XL}}/{{1,2,4,8}}, "
            "LightningDiT-{B,L,XL,1p0B,1p6B}/{1,2} and DiT-{S,B,L,XL}/{2,4,8}"
        )
    return dict(PRESETS[name])


def fields_of_latents(latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The fields of `SiTConfig` that latents [C, H, W] decide; `UserError` where they are not square nor one row."""
    channels, height, width = latent_shape
    if height not in (1, width):
        raise UserError(
            f"the latents are {channels} x {height} x {width}, and a generator is for square ones or a sequence in one "
            "row: make others with `sendvae cache-latents`"
        )
    return dict(latent_channels=channels, latent_size=width, one_dimensional=is_sequence(latent_shape))


def is_sequence(latent_shape: tuple[int, int, int]) -> bool:
    """Whether latents [C, H, W] are tokens in one row, such as MAETok's, and not a grid."""
    return latent_shape[1] == 1 < latent_shape[2]


def check_repa_block(block: int, depth: int, name: str) -> None:
    """Raise UserError, in which the setting is called `name`, unless a SiT of this depth has such a block."""
    if not 1 <= block <= depth:
        raise UserError(
            f"{name}={block} must be between 1 and depth={depth}: the projector reads the tokens after that block"
        )


@dataclass(kw_only=True)
class SiTSizes:
    """Sizes and switches of a `SiT` that neither the latents nor the data decide; null stands for "not given".

    Raises `UserError` for a value out of range, and for those that are given but do not fit together.
    """

    section: ClassVar[str] = "SiT"
    """What the sizes are settings of, for messages."""

    patch_size: int | None = None
    """Latent positions per token and side: 1 for f16 latents, 2 for f8. null: the preset's, 1 without one."""
    width: int | None = None
    """Width of the transformer. null: the preset's."""
    depth: int | None = None
    """Transformer blocks. null: the preset's."""
    num_heads: int | None = None
    """Attention heads. null: the preset's."""
    swiglu: bool | None = None
    """SwiGLU of two thirds the hidden width instead of the GELU MLP, as in LightningDiT. null: the preset's, off
    without one."""
    rms_norm: bool | None = None
    """RMSNorm with weights instead of LayerNorm without, as in LightningDiT. null: the preset's, off without one."""
    rope: bool | None = None
    """Rotary positions on queries and keys, beside the fixed sine-cosine ones, as in LightningDiT. null: the preset's,
    off without one."""
    qk_norm: bool | None = None
    """Normalise queries and keys in every head (RMSNorm with `rms_norm`, else LayerNorm): against NaN in long runs.
    null: off."""
    diffusion: bool | None = field(default=None, metadata={checks.ADDED_LATER: True})
    """Predict the noise and its variance at one of 1000 diffusion steps, as DiT, in place of the velocity at a noise
    level. null: the preset's, off without one."""
    trained_positions: bool | None = field(default=None, metadata={checks.ADDED_LATER: True})
    """Train the position embedding, which begins as the sine-cosine one, as REPA-E's end-to-end script does. null:
    off."""
    label_dropout: float = 0.1
    """Share of labels that training replaces by the null class, for classifier-free guidance. Drawn by the caller, not
    by the network."""
    projector_width: int = 2048
    """Hidden width of the REPA projector."""

    def __post_init__(self) -> None:
        sizes = ("patch_size", "width", "depth", "num_heads", "projector_width")
        checks.at_least(1, self, *sizes, where=self.section)
        checks.in_interval("[1, 1000]", self, "depth", where=self.section)
        checks.in_interval("[0, 1)", self, "label_dropout", where=self.section)
        if self.width is None or self.num_heads is None:
            return
        if self.width % 4 or self.width % self.num_heads:
            raise UserError(
                f"{self.section}.width={self.width} must be a multiple of 4 (sine-cosine positions) and of "
                f"num_heads={self.num_heads}"
            )
        if self.rope and self.width // self.num_heads % 4:
            raise UserError(
                f"{self.section}.rope needs heads of a width that is a multiple of 4 (pairs for rows and for columns), "
                f"but width={self.width} / num_heads={self.num_heads} is {self.width // self.num_heads}: change "
                "either, or set rope=false"
            )


@dataclass(kw_only=True)
class SiTConfig(SiTSizes):
    """All sizes of a `SiT`, none left open. Raises `UserError` for sizes that do not fit together."""

    # `field()` keeps these required: without it they inherit the default of `SiTSizes`.
    patch_size: int = field()
    width: int = field()
    depth: int = field()
    num_heads: int = field()
    swiglu: bool = False
    rms_norm: bool = False
    rope: bool = False
    qk_norm: bool = False
    diffusion: bool = False
    trained_positions: bool = False
    latent_size: int
    """Height and width of the latent; its length where it is a sequence."""
    latent_channels: int
    """Channels of the latent."""
    num_classes: int
    """Classes of the data; index `num_classes` is the null class of classifier-free guidance."""
    repa_dim: int | None = None
    """Width of the foundation model's features; without it the network has no REPA projector."""
    repa_block: int = 8
    """The projector reads the tokens after this many blocks."""
    one_dimensional: bool = False
    """The latent is a sequence, [C, 1, latent_size], and not square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "latent_size", "latent_channels", "num_classes", where=self.section)
        if self.latent_size % self.patch_size:
            raise UserError(
                f"{self.section}.latent_size={self.latent_size} must be a multiple of patch_size={self.patch_size}"
            )
        if self.one_dimensional and self.patch_size != 1:
            raise UserError(
                f"{self.section}.patch_size={self.patch_size} is for latents that are a grid, and these are a sequence "
                f"of {self.latent_size} tokens: give patch_size=1"
            )
        if self.one_dimensional and self.repa_dim is not None:
            raise UserError(NO_REPA)
        if self.repa_dim is not None:
            check_repa_block(self.repa_block, self.depth, f"{self.section}.repa_block")

    @classmethod
    def preset(cls, name: str, **fields: Any) -> SiTConfig:
        """A published network by name (see `PRESETS`); `fields` gives the other fields, or other switches.

        >>> SiTConfig.preset("SiT-XL/1", latent_size=16, latent_channels=32, num_classes=1000, repa_dim=768)
        """
        return cls(**{**preset_sizes(name), **fields})

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one latent, [C, H, W]."""
        return self.latent_channels, 1 if self.one_dimensional else self.latent_size, self.latent_size

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        _, height, width = self.latent_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N."""
        rows, columns = self.grid_shape
        return rows * columns

    @property
    def out_channels(self) -> int:
        """Channels of the output: the latent's, and with `diffusion` as many again for the variance."""
        return (2 if self.diffusion else 1) * self.latent_channels

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads
