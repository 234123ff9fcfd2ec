"""Batch-norm running statistics that agree on all ranks and survive a bad batch."""

import torch
from torch import Tensor, nn

from sendvae_fast.engine.distributed import Distributed

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class RunningStatistics:
    """Keeps the batch-norm buffers of a module consistent from step to step.

    Gradients are averaged over ranks but batch-norm updates its running statistics from the local batch. Without help
    ranks drift apart, a checkpoint holds one rank's view, and a resumed run differs from an uninterrupted one. And a
    batch with NaN, whose update is skipped, would still leave NaN in the buffers for good.
    """

    def __init__(self, module: nn.Module, distributed: Distributed) -> None:
        self._modules = [
            part for part in module.modules() if isinstance(part, BATCH_NORMS) and part.track_running_stats
        ]
        self._distributed = distributed
        self._kept = [buffer.clone() for buffer in self._buffers()]

    def _buffers(self) -> list[Tensor]:
        return [getattr(part, name) for part in self._modules for name in STATISTICS]

    @torch.no_grad()
    def commit(self, good: Tensor | bool = True) -> None:
        """Average the statistics over ranks, where a training forward may have moved them apart, and keep them.

        good: False, or a scalar tensor of it on the device, restores those that the last `commit` kept.
        """
        if good is False:
            if self._kept:
                torch._foreach_copy_(self._buffers(), self._kept)
            return
        moving = [
            getattr(part, name)
            for part in self._modules
            if part.training and not isinstance(part, nn.SyncBatchNorm)
            for name in STATISTICS[:2]
        ]
        if moving and self._distributed.world_size > 1:
            flat = self._distributed.all_reduce_mean(torch.cat(moving))
            torch._foreach_copy_(moving, list(flat.split([buffer.numel() for buffer in moving])))
        if not self._kept:
            return
        buffers = self._buffers()
        if isinstance(good, Tensor):
            chosen = [torch.where(good, new, old) for new, old in zip(buffers, self._kept, strict=True)]
            torch._foreach_copy_(buffers, chosen)
        torch._foreach_copy_(self._kept, buffers)
