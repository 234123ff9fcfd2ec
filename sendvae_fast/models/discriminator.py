"""PatchGAN discriminator (pix2pix; the variant of VQGAN and latent-diffusion, with the same state-dict layout)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.discriminator_config import CHANNELS_PER_GROUP, DiscriminatorConfig
from sendvae_fast.models.weights import load_weights, part_of_checkpoint, read_weights


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
    return nn.GroupNorm(width // CHANNELS_PER_GROUP, width)


def _init_pix2pix(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
