"""Sizes of the discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.errors import UserError

CHANNELS_PER_GROUP = 16


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """Sizes of a `Discriminator`. Raises `UserError` for sizes that do not fit together."""

    base_channels: int = 64
    """Channels after the first convolution."""
    num_layers: int = 3
    """Stride-2 convolutions; 3 judges patches of 70 x 70 pixels."""
    norm: Literal["batch", "group"] = "batch"
    """``batch`` is the published network. ``group`` takes statistics per sample, so that the result does not depend on
    how the batch is split over ranks."""
    sync_batch_norm: bool = False
    """Take batch norm's statistics over the batches of all ranks (SyncBatchNorm, on GPUs only); without it each rank's
    batch by itself, as REPA-E and VA-VAE do."""

    def __post_init__(self) -> None:
        checks.choices(self, where="discriminator")
        checks.at_least(1, self, "base_channels", "num_layers", where="discriminator")
        if self.sync_batch_norm and self.norm != "batch":
            raise UserError(f"discriminator sync_batch_norm is for norm=batch: norm={self.norm} has no such statistics")
        if self.norm == "group" and 2 * self.base_channels % CHANNELS_PER_GROUP:
            raise UserError(
                f"discriminator base_channels={self.base_channels} with norm=group must be a multiple of "
                f"{CHANNELS_PER_GROUP // 2}"
            )
