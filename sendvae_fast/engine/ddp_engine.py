"""The engine to compare others with: DistributedDataParallel, or the plain module on one rank."""

import inspect
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.ops.layout import MEMORY_FORMAT

NEVER = 2**31 - 1


def _distributed(module: nn.Module) -> DistributedDataParallel:
    """DDP without its copy of rank 0's buffers at each forward: RunningStatistics averages them instead."""
    options = inspect.signature(DistributedDataParallel).parameters
    # The option's name since torch 2.15, and until 2.14.
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    without_buffers: dict[str, Any] = {name: False}
    return DistributedDataParallel(module, **without_buffers)


class DDPEngine(Engine):
    """An engine whose every rank holds all state; DDP averages gradients in buckets."""

    def __init__(
        self, module: nn.Module, optimizer_config: OptimizerConfig, config: EngineConfig, distributed: Distributed
    ) -> None:
        super().__init__(module.to(memory_format=MEMORY_FORMAT), optimizer_config, config, distributed)
        self._forward = self.module
        if distributed.world_size > 1:
            self._forward = _distributed(self.module)
            if config.cuda_graph:
                # DDP times every hundredth iteration with events that the host waits for: an error while recording.
                self._forward._set_ddp_runtime_logging_sample_rate(NEVER)
        self.optimizer.init_state(self.trained.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # DDP decides in the forward whether the coming backward will reduce.
        forward = self._forward
        waits = self._accumulates and isinstance(forward, DistributedDataParallel)
        with forward.no_sync() if waits else nullcontext(), self.autocast():  # pyright: ignore[reportCallIssue] - DDP's
            return forward(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        (loss / self.config.accumulation_steps).backward()

    def _apply_gradients(self) -> Tensor | float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.optimizer.grad_norm is not None
        return self.optimizer.grad_norm

    def gather(self, name: str, kind: str) -> Tensor:
        param = self.module.get_parameter(name)
        return param.detach() if kind == "model" else self.optimizer.state[param][kind]

    def scatter(self, name: str, kind: str, value: Tensor) -> None:
        self.gather(name, kind).copy_(value)

    def close(self) -> None:
        self._forward = self.module
