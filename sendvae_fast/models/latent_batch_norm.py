"""The batch norm through which REPA-E's generator sees the latents of an autoencoder that is still in training.

Shape letters: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sendvae_fast.engine.distributed import Distributed


class LatentBatchNorm(nn.BatchNorm2d):
    """Statistics of latents per channel: running ones, and their moving average.

    As `bn` of REPA-E's SiT (momentum 0.1, eps 1e-4, no affine parameters) and under its names, but that the latents
    themselves are normalised by `ops.noise_inject`, in the pass that noises them:

    - the autoencoder learns through `statistics()`, the running ones, which are constants to its gradients;
    - the generator learns on latents normalised by their own batch, and `follow` moves the running ones towards it;
    - what is exported is the average over steps (`averaged`), as the weights that samples are drawn from are.

    The class is a BatchNorm2d, so that engines treat its buffers as batch-norm statistics.

    Args:
        latent_channels: C.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    ema_mean: Tensor
    ema_var: Tensor
    momentum: float

    def __init__(self, latent_channels: int) -> None:
        super().__init__(latent_channels, eps=1e-4, momentum=0.1, affine=False)
        self.register_buffer("ema_mean", self.running_mean.clone())
        self.register_buffer("ema_var", self.running_var.clone())

    def set_statistics(self, latent_mean: Tensor, latent_std: Tensor) -> None:
        """Start from known statistics, each [C]."""
        for mean in (self.running_mean, self.ema_mean):
            mean.copy_(latent_mean)
        for variance in (self.running_var, self.ema_var):
            variance.copy_(latent_std.square())

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The running mean and what latents are divided by, each float32 [C]."""
        return self.running_mean.clone(), (self.running_var + self.eps).sqrt()

    def averaged(self) -> tuple[Tensor, Tensor]:
        """Moving averages: the mean, and the root of the variance without eps, as REPA-E exports and decodes by it."""
        return self.ema_mean.clone(), self.ema_var.sqrt()

    @torch.no_grad()
    def follow(self, latents: list[Tensor], distributed: Distributed) -> tuple[Tensor, Tensor]:
        """Move the running statistics towards those of a batch over all ranks. Collective.

        Args:
            latents: the batch in parts of equal size, each [B, C, H, W].

        Returns:
            The batch's own mean, and what its latents are divided by (with eps), each float32 [C].
        """
        parts = [latent.double().transpose(0, 1).flatten(1) for latent in latents]  # [C, B H W]
        moments = sum(torch.stack([part.mean(1), part.square().mean(1)]) for part in parts) / len(parts)
        mean, second = distributed.all_reduce_mean(torch.as_tensor(moments))
        variance = second - mean.square()
        count = distributed.world_size * sum(part.shape[1] for part in parts)
        # torch's batch norm keeps the unbiased variance and divides by the biased one.
        unbiased = variance * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.float(), self.momentum)
        self.running_var.lerp_(unbiased.float(), self.momentum)
        self.num_batches_tracked += 1
        return mean.float(), (variance + self.eps).sqrt().float()

    @torch.no_grad()
    def average(self, decay: float, good: Tensor) -> None:
        """Move the averages towards the running statistics, unless the step was skipped.

        decay: share that the averages keep. good: bool, a scalar on the device; False leaves them.
        """
        weight = (1 - decay) * good.to(self.ema_mean)
        self.ema_mean.lerp_(self.running_mean, weight)
        self.ema_var.lerp_(self.running_var, weight)
