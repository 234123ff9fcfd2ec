"""Sizes of the autoencoder, and the published ones by name."""

from __future__ import annotations

from dataclasses import dataclass

from sendvae_fast import checks
from sendvae_fast.errors import UserError

_F16 = dict(channel_multipliers=(1, 1, 2, 2, 4), attention_resolutions=(16,))
_PRESETS = {
    "f8d4": dict(channel_multipliers=(1, 2, 4, 4), attention_resolutions=(), latent_channels=4),
    "f16d16": dict(**_F16, latent_channels=16),
    "f16d32": dict(**_F16, latent_channels=32),
    "f16d64": dict(**_F16, latent_channels=64),
}


@dataclass(kw_only=True)
class AutoencoderConfig:
    """Sizes of an `Autoencoder`. The defaults are ``f16d32``, the architecture of VA-VAE and Send-VAE.

    Raises `UserError` for sizes that do not fit together.
    """

    base_channels: int = 128
    """Feature channels at the highest resolution."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Feature channels of each level over `base_channels`, highest resolution first. Sizes halve between levels."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; decoder levels have one more."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Levels with attention after each residual block, named by the resolution they have at `nominal_resolution`."""
    nominal_resolution: int = 256
    """The image size that `attention_resolutions` refers to. Images of other sizes keep the same levels."""
    latent_channels: int = 32
    """Channels of the latent."""
    num_groups: int = 32
    """Groups of every GroupNorm; must divide every level's channels."""
    mid_attention: bool = True
    """Whether the lowest level has an attention block in its middle."""

    def __post_init__(self) -> None:
        # JSON and YAML give lists.
        self.channel_multipliers = tuple(self.channel_multipliers)
        self.attention_resolutions = tuple(self.attention_resolutions)
        if not self.channel_multipliers:
            raise UserError("autoencoder channel_multipliers is empty: give one multiplier per level, e.g. [1, 2, 4]")
        checks.at_least(
            1, self, "base_channels", "num_res_blocks", "latent_channels", "num_groups", "nominal_resolution",
            where="autoencoder",
        )  # fmt: skip
        checks.in_interval("[1, 100]", self, "num_res_blocks", where="autoencoder")
        for width in self.widths:
            if width < 1 or width % self.num_groups:
                raise UserError(
                    f"autoencoder level of {width} channels cannot be split into num_groups={self.num_groups}: change "
                    "num_groups, base_channels or channel_multipliers"
                )
        unreached = set(self.attention_resolutions) - {self.nominal_resolution >> i for i in range(self.num_levels)}
        if unreached:
            raise UserError(
                f"autoencoder attention_resolutions {sorted(unreached)} are not the resolution of any level: at "
                f"nominal_resolution={self.nominal_resolution} the levels are "
                f"{[self.nominal_resolution >> i for i in range(self.num_levels)]}"
            )

    @classmethod
    def preset(cls, name: str) -> AutoencoderConfig:
        """``f8d4`` (SD-VAE), ``f16d16``, ``f16d32`` (VA-VAE, Send-VAE) or ``f16d64``; `UserError` for another name."""
        if name not in _PRESETS:
            raise UserError(f"unknown autoencoder preset {name!r}: choose one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])

    @property
    def num_levels(self) -> int:
        return len(self.channel_multipliers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Feature channels of each level, highest resolution first."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """Image size over latent size."""
        return 2 ** (self.num_levels - 1)

    def has_attention(self, level: int) -> bool:
        return self.nominal_resolution >> level in self.attention_resolutions

    def differences(self, other: AutoencoderConfig) -> list[str]:
        """The differences from the network of `other`, in words. Levels named by other resolutions do not count."""
        own, others = self._network(), other._network()
        return [f"{name} {own[name]} instead of {others[name]}" for name in own if own[name] != others[name]]

    def _network(self) -> dict:
        names = ("attention_resolutions", "nominal_resolution")
        sizes = {name: value for name, value in vars(self).items() if name not in names}
        return sizes | {"attention in levels": [self.has_attention(level) for level in range(self.num_levels)]}
