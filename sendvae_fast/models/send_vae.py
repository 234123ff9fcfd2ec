"""The network of stage 1: an autoencoder whose noised latents are mapped to a foundation model's features.

Equations 1-3 of the paper, without the losses. Shape letters: B batch, C latent channels, H W latent size, N tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sendvae_fast.models.autoencoder.autoencoder import LOGVAR_RANGE, Autoencoder
from sendvae_fast.ops import noise_inject

_AUTOENCODER = "autoencoder."
LatentNormKind = Literal["running", "fixed", "none"]


class LatentNorm(nn.BatchNorm2d):
    """Per-channel mean and standard deviation of the latents, by which they are normalised before noise is added.

    `running` follows the training latents (momentum 0.1, eps 1e-4, no affine parameters, as REPA-E's `bn`); the first
    batch sets them, and on several ranks they are those of the global batch. `fixed` keeps the statistics loaded with
    the autoencoder. `none` leaves latents as they are. No gradient flows through the statistics.

    It is a BatchNorm2d for its buffers, so that engines treat them as what they are; the normalisation itself is fused
    into `noise_inject`. `running_var` has eps in it: the square of what latents are divided by, so that statistics come
    out as they were put in.
    """

    def __init__(self, latent_channels: int, kind: LatentNormKind = "running") -> None:
        super().__init__(latent_channels, eps=1e-4, momentum=0.1, affine=False)
        self.kind = kind

    def set_statistics(self, latent_mean: Tensor, latent_std: Tensor) -> None:
        """Start from known per-channel statistics, each [C]."""
        self.running_mean.copy_(latent_mean)
        self.running_var.copy_(latent_std.square())
        self.num_batches_tracked.fill_(1)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation), each [C] float32."""
        if self.kind == "none":
            return torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        # A clone: backward reads it after the next forward of an accumulated step has moved the buffer.
        return self.running_mean.clone(), self.running_var.sqrt()

    @torch.no_grad()
    def update(self, mean: Tensor, logvar: Tensor) -> None:
        """Move the running statistics towards those of the posterior samples of a batch, moments [B, C, H, W] each.

        The variance of a sample is the variance of its mean plus its own: the statistics need no draw.
        """
        mean, variance = mean.float(), logvar.float().clamp(*LOGVAR_RANGE).exp()
        count = mean.new_full((1,), mean.numel() / mean.shape[1])
        sums = torch.cat([mean.sum((0, 2, 3)), (mean.square() + variance).sum((0, 2, 3)), count])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        first, second = (sums[:-1] / sums[-1]).chunk(2)
        # Decided on the device: the first batch sets the statistics, later ones move them.
        momentum = torch.where(self.num_batches_tracked == 0, 1.0, self.momentum).to(self.running_mean)
        self.running_mean.lerp_(first, momentum)
        self.running_var.lerp_(second - first.square() + self.eps, momentum)
        self.num_batches_tracked += 1


class SendVAEOutput(NamedTuple):
    """What stage 1's losses need of one forward pass."""

    reconstruction: Tensor  # [B, 3, S, S]
    moments: Tensor  # [B, 2C, H, W]
    features: Tensor | None  # [B, N, target_dim], the foundation model's width; None without a mapper


class SendVAE(nn.Module):
    """Autoencoder and mapper trained as one network; a run without alignment has no mapper.

    A mapper is any module from latents to features [B, N, target_dim] that says what it wants of them:

    - ``reads``: "z", the posterior's sample [B, C, H, W], or "z_t", which is normalised and noised
    - ``patch_size``: P, to get z_t as tokens [B, N, C P P]; None where it does not matter
    - ``noise``: whether z_t is noised (Equation 1) or only normalised (the paper's Table 3)

    Args:
        autoencoder: the autoencoder to train.
        mapper: h of Equation 2, or None for a run without alignment.
        latent_norm: see `LatentNorm`.
    """

    def __init__(
        self, autoencoder: Autoencoder, mapper: nn.Module | None, latent_norm: LatentNormKind = "running"
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.mapper = mapper
        self.latent_norm = LatentNorm(autoencoder.config.latent_channels, latent_norm)

    def forward(self, x: Tensor, key: Tensor, sample_ids: Tensor) -> SendVAEOutput:
        """Images [B, 3, S, S] in [-1, 1], the step's random key and the samples' ids [B] to a `SendVAEOutput`."""
        moments = self.autoencoder.encode(x)
        mean, logvar = moments.chunk(2, dim=1)
        if self.training and self.latent_norm.kind == "running":
            self.latent_norm.update(mean.detach(), logvar.detach())
        statistics = self.latent_norm.statistics()
        mapper = self.mapper
        t = None if mapper is not None and mapper.noise else torch.zeros(x.shape[0], device=x.device)
        patch_size = None if mapper is None else mapper.patch_size
        latents = noise_inject(mean, logvar, *statistics, key, sample_ids, t, patch_size=patch_size)
        features = None if mapper is None else mapper(getattr(latents, mapper.reads))
        # Aliases, as engines hang hooks on outputs: gradients from inside to inside (`losses.adaptive`) meet none.
        outputs = (self.autoencoder.decode(latents.z), moments, features)
        return SendVAEOutput(*(None if part is None else part.view_as(part) for part in outputs))


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a `SendVAE` as its autoencoder's own, and the rest: mapper and latent statistics."""
    own = {name: value for name, value in state.items() if name.startswith(_AUTOENCODER)}
    rest = {name: value for name, value in state.items() if name not in own}
    return {name.removeprefix(_AUTOENCODER): value for name, value in own.items()}, rest


def join_state(autoencoder: dict[str, Tensor], rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `SendVAE` from what `split_state` made of it."""
    return {**{f"{_AUTOENCODER}{name}": value for name, value in autoencoder.items()}, **rest}
