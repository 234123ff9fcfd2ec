"""LPIPS, the learned perceptual distance of Zhang et al. (2018), from local weight files only."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import lpips
import torch
from torch import Tensor, nn

from sendvae_fast.errors import UserError
from sendvae_fast.losses.settings import BACKBONE_FILES, PerceptualConfig
from sendvae_fast.models.precision import cast_parameters
from sendvae_fast.models.weights import load_weights, read_weights
from sendvae_fast.ops import lpips_distance


class Perceptual(nn.Module):
    """LPIPS distance between images [B, 3, H, W] in [-1, 1] (not [0, 1]: the package rescales from [-1, 1] itself).

    The network, its weights and its heads are the lpips package's; what follows the network is `ops.lpips_distance`.
    Frozen: no weight takes a gradient and evaluation mode stays, but `x_hat` does take one.
    """

    def __init__(self, config: PerceptualConfig):
        super().__init__()
        with warnings.catch_warnings():
            # lpips uses deprecated torchvision arguments. They ask for random weights: nothing is fetched.
            warnings.filterwarnings("ignore", module="torchvision")
            self.lpips = lpips.LPIPS(net=config.net, pretrained=False, pnet_rand=True, verbose=False)
        if not config.random_weights:
            load_weights(self.lpips.net, _backbone_state(config, self.lpips.net), config.weights)
            heads = config.heads or Path(lpips.__file__).parent / "weights" / "v0.1" / f"{config.net}.pth"
            self._load_heads(heads)
        for stage in self.lpips.net.children():
            # A plain attribute, see `engine.blocks`.
            stage.compiles = isinstance(stage, nn.Sequential)  # pyright: ignore[reportArgumentType]
        self.net, self.legacy_range = config.net, config.legacy_range
        self.requires_grad_(False).eval()
        self.dtype = torch.float32

    def compute_in(self, dtype: torch.dtype) -> Perceptual:
        """Hold the network's weights in `dtype` and compute its features in it; call it outside autocast.

        Heads, norms and sums stay float32. bfloat16 gives what autocast gives: with the squeeze network on four
        photographs and their blurred copies, distances within 1% of float32's, and gradients whose cosine with
        float32's is 0.92 to 0.98.
        """
        cast_parameters(self.lpips.net, dtype)
        self.dtype = dtype
        return self

    def _load_heads(self, path: str | Path) -> None:
        # The package registers each head twice, as `lin0` and as `lins.0`; the file names it once.
        heads = nn.ModuleDict({f"lin{i}": head for i, head in enumerate(self.lpips.lins)})
        load_weights(heads, read_weights(path), path)

    def train(self, mode: bool = True) -> Perceptual:
        """Frozen: part of a module that trains, it stays in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The distance of each pair, float [B]; symmetric in its arguments, with a gradient for x_hat alone."""
        with torch.no_grad():
            features = self._features(x)
        features_hat = self._features(x_hat)
        heads: Any = self.lpips.lins
        layers = zip(features, features_hat, heads, strict=True)
        # A head is a dropout, idle in evaluation, and a 1x1 convolution to one channel.
        parts = [lpips_distance(f, f_hat, head.model[-1].weight.flatten()) for f, f_hat, head in layers]
        return functools.reduce(torch.add, parts)

    def _features(self, x: Tensor) -> tuple[Tensor, ...]:
        shown = 2 * x - 1 if self.legacy_range else x
        return self.lpips.net(self.lpips.scaling_layer(shown).to(self.dtype))


def _backbone_state(config: PerceptualConfig, net: nn.Module) -> dict[str, Tensor]:
    """The file's tensors under lpips' names: feature module 3 of torchvision is, say, ``slice2.3``."""
    state = read_weights(config.weights)
    slices = {key.split(".")[1]: key.split(".")[0] for key in net.state_dict()}
    renamed = {}
    for key, value in state.items():
        module, _, rest = key.removeprefix("features.").partition(".")
        if module in slices:
            renamed[f"{slices[module]}.{module}.{rest}"] = value
    if not renamed:
        raise UserError(
            f"{config.weights} holds no features of LPIPS-{config.net}'s backbone: give torchvision's "
            f"{BACKBONE_FILES[config.net]}"
        )
    return renamed
