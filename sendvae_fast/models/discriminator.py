"""PatchGAN discriminator (pix2pix; the variant of VQGAN and latent-diffusion, with the same state-dict layout)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.models.weights import load_weights, part_of_checkpoint, read_weights

_CHANNELS_PER_GROUP = 16


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
        if self.norm == "group" and 2 * self.base_channels % _CHANNELS_PER_GROUP:
            raise UserError(
                f"discriminator base_channels={self.base_channels} with norm=group must be a multiple of "
                f"{_CHANNELS_PER_GROUP // 2}"
            )


class Discriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to real-or-fake logits [B, 1, h, w]: 256 pixels give 30 x 30 logits."""

    compiles = True  # see `engine.blocks`; not recomputed: batch norm would count a batch twice

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        width = config.base_channels
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.num_layers + 1):
            out_width = config.base_channels * min(2**layer, 8)
            stride = 2 if layer < config.num_layers else 1
            layers += [
                nn.Conv2d(width, out_width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(out_width) if config.norm == "batch" else _group_norm(out_width),
                nn.LeakyReLU(0.2),
            ]
            width = out_width
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_pix2pix)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def load_discriminator_weights(discriminator: Discriminator, path: str | Path) -> None:
    """Load a discriminator from its own file (ours, REPA-E's) or out of a training checkpoint (REPA-E, VA-VAE).

    `UserError` where there is none, or one of other sizes, or one with NaN.
    """
    found = part_of_checkpoint(read_weights(path), "main.0.weight", ("discriminator", "state_dict"))
    state = {key: value for key, value in found.items() if key.startswith("main.")}
    if not state:
        raise UserError(f"{path} holds no discriminator, it has no main.0.weight: give a discriminator's checkpoint")
    load_weights(discriminator, state, path)


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(width // _CHANNELS_PER_GROUP, width)


def _init_pix2pix(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
