"""Equation 1 of Send-VAE as a module: sample, normalise and noise the latents of any Gaussian autoencoder.

Shape letters: B batch, C latent channels, H W latent size, P patch size, N tokens.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sendvae_fast.ops import noise_inject
from sendvae_fast.ops.noise_inject import LOGVAR_MAX, LOGVAR_MIN, NoiseInjectOutput

LatentNormKind = Literal["running", "fixed", "none"]


class NoiseInjection(nn.BatchNorm2d):
    """Draw a latent of its posterior, normalise it by the latents' statistics, and noise it: `ops.noise_inject`.

    The statistics are one mean and one standard deviation per channel. `running` follows the training latents
    (momentum 0.1, eps 1e-4, no affine parameters, as REPA-E's `bn`); the first batch sets them, and on several ranks
    they are those of the global batch. `fixed` keeps what `set_statistics` or a state dict gave. `none` leaves latents
    as they are. No gradient flows through the statistics.

    The class is a BatchNorm2d, so that engines treat its buffers as batch-norm statistics. `running_var` includes eps:
    it is the square of the latents' divisor, so that `statistics` returns what `set_statistics` was given.

    Args:
        latent_channels: C.
        kind: the source of the statistics, see above.

    Raises:
        ValueError: when called, moments that do not fit, see `ops.noise_inject`.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, latent_channels: int, kind: LatentNormKind = "running") -> None:
        super().__init__(latent_channels, eps=1e-4, momentum=0.1, affine=False)
        if kind not in get_args(LatentNormKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(LatentNormKind))}, got {kind!r}")
        self.kind = kind

    def forward(
        self,
        mean: Tensor,
        logvar: Tensor,
        key: Tensor,
        sample_ids: Tensor,
        t: Tensor | None = None,
        *,
        patch_size: int | None = None,
        need_velocity: bool = True,
    ) -> NoiseInjectOutput:
        """In training mode, first move the running statistics towards those of this batch.

        Args:
            mean: of the posterior, [B, C, H, W].
            logvar: of the posterior, like mean.
            key: int64 [2] from `ops.philox.make_key(seed, step)`: another step, other noise.
            sample_ids: int64 [B]; the noise of a sample depends on key and id alone.
            t: noise levels, float32 [B]; None draws them uniformly. Zeros normalise without noise.
            patch_size: P, to get z_t as tokens [B, N, C P P].
            need_velocity: False leaves velocity out: it comes empty.

        Returns:
            (z, z_t, velocity, t): z is the decoder's input, z_t the mapper's, see `NoiseInjectOutput`.
        """
        if self.training and self.kind == "running":
            self.update(mean.detach(), logvar.detach())
        return noise_inject(
            mean, logvar, *self.statistics(), key, sample_ids, t, patch_size=patch_size, need_velocity=need_velocity
        )

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
        mean, variance = mean.float(), logvar.float().clamp(LOGVAR_MIN, LOGVAR_MAX).exp()
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
