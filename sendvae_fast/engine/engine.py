"""The interface of every engine to a trainer."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sendvae_fast.engine.blocks import compile_blocks, recompute_blocks
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.optimizer import AdamWEMA
from sendvae_fast.engine.running_statistics import RunningStatistics
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.engine.state import TrainingState, trained_parameters
from sendvae_fast.engine.streams import ToHost


def dtype_of(config: EngineConfig) -> torch.dtype:
    """The dtype in which the networks compute."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


class StepResult(NamedTuple):
    """The outcome of one optimizer step; the same on every rank."""

    grad_norm: float
    """Global L2 norm of the averaged gradients before clipping; not finite when the step was skipped."""

    skipped: bool
    """True when a gradient was not finite on any rank: parameters, state and EMA are as before on all ranks."""


class Engine(TrainingState):
    """A module in training: forward, backward, step, and its state as full tensors by parameter name.

    The loss given to `backward` is a mean over the local batch; gradients are averaged over ranks, so ranks with equal
    batches together equal one rank with the whole batch. Several engines may live in one process.

    Parameters stay fp32. Which parameters are trained is read from `requires_grad` when the engine is built.
    """

    def __init__(
        self, module: nn.Module, optimizer_config: OptimizerConfig, config: EngineConfig, distributed: Distributed
    ) -> None:
        module = module.to(distributed.device)
        if config.compile:
            compile_blocks(module)
        if config.recompute:
            recompute_blocks(module)
        optimizer = AdamWEMA.from_config(
            trained_parameters(module).values(), optimizer_config, whole_gradients=config.has_whole_gradients
        )
        super().__init__(module, optimizer, distributed)
        self.config, self.optimizer_config = config, optimizer_config
        for buffer in self.module.buffers():
            distributed.broadcast(buffer)
        self._num_backward = 0
        self._unread: ToHost | float | None = None  # the norm of a step that the host has not looked at
        self._running_statistics = RunningStatistics(self.module, distributed)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, at the engine's precision."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` / `accumulation_steps`, averaged over ranks by the last of a step."""

    @abstractmethod
    def _apply_gradients(self) -> Tensor | float:
        """Clip and update unless the averaged gradients are not finite, drop them, return their norm.

        As a tensor it is on the device.
        """

    @property
    def _accumulates(self) -> bool:
        """Whether further backward passes follow the coming one before a step."""
        return self._num_backward + 1 < self.config.accumulation_steps

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a scalar, mean over the local batch). `accumulation_steps` calls per step."""
        self._backward(loss)
        self._num_backward += 1

    def step(self) -> StepResult:
        """Update the parameters with the averaged, clipped gradients, then drop the gradients.

        Non-finite gradients on any rank skip the update on all ranks: nothing is raised, `skipped` is True and
        `num_skipped` counts. Batch-norm running statistics return to their values after the last good step. The host
        waits for the step.

        Raises:
            RuntimeError: `backward` was not called `accumulation_steps` times.
        """
        self.see(self.queue_step())
        result = self._read()
        assert result is not None
        return result

    def queue_step(self) -> Tensor | float:
        """The device's part of `step`, where it is decided whether the step is skipped; it can be recorded.

        Returns the norm where it is: a scalar on the device, or a number at ZeRO 1 to 3, where DeepSpeed reads it in
        any case. `see` takes it.
        """
        if self._num_backward != self.config.accumulation_steps:
            raise RuntimeError(
                f"step after {self._num_backward} backward passes; accumulation_steps is "
                f"{self.config.accumulation_steps}"
            )
        self._num_backward = 0
        norm = self._apply_gradients()
        self._running_statistics.commit(norm.isfinite() if isinstance(norm, Tensor) else math.isfinite(norm))
        return norm

    def see(self, norm: Tensor | float) -> None:
        """The host's part of `step`: count the step if it was skipped, which a norm on the device tells a step later.

        Args:
            norm: of the step that was queued, or replayed, last.
        """
        self._read()
        self._unread = ToHost(norm) if isinstance(norm, Tensor) else norm

    @property
    def num_skipped(self) -> int:
        """Steps skipped so far, of those that `see` was told of; the host waits for the norm of the last."""
        self._read()
        return self._num_skipped

    @num_skipped.setter
    def num_skipped(self, value: int) -> None:
        self._unread, self._num_skipped = None, value

    def _read(self) -> StepResult | None:
        """The result of the last step, if the host has not looked at it yet."""
        norm, self._unread = self._unread, None
        if norm is None:
            return None
        grad_norm = norm.wait() if isinstance(norm, ToHost) else norm
        skipped = not math.isfinite(grad_norm)
        self._num_skipped += skipped
        return StepResult(grad_norm, skipped)

    def autocast(self) -> torch.autocast:
        """The context that gives the engine's precision to computations outside its own call."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.distributed.device.type, torch.bfloat16, enabled=enabled)

    def input_gradient(
        self, x: Tensor, loss: Callable[[Any], Tensor], part: Callable[[Tensor], Any] | None = None
    ) -> tuple[Any, Tensor]:
        """The module's output for `x`, and the gradient of `loss` of that output with respect to `x`.

        For a GAN: the generator learns from the gradient, and the graph of the output goes into this engine's own
        `backward` afterwards, so that one forward serves both. No parameter gets a gradient here, and `x` is cut off
        its graph.

            logits, gradient = critic.input_gradient(fake, generator_loss)
            critic.backward(critic_loss(logits, critic(real)))

        `backward` still needs a call of the engine itself in its loss, here the one for real pictures. Not for ZeRO 3,
        whose hooks gather a module's weights for one traversal of its graph only.

        `part` runs a part of the module on `x` in place of all of it.

        Raises:
            ValueError: the engine is at ZeRO stage 3.
        """
        if not self.config.has_whole_parameters:
            raise ValueError("input_gradient goes through a graph twice, which ZeRO stage 3 does not allow")
        leaf = x.detach().requires_grad_()
        with self.autocast():
            output = self.module(leaf) if part is None else part(leaf)
        (gradient,) = torch.autograd.grad(loss(output), leaf, retain_graph=True)
        return output, gradient

    def load_model(self, tensors: dict[str, Tensor]) -> None:
        """Load a full state dict, see `TrainingState.load_model`."""
        super().load_model(tensors)
        self._running_statistics.commit()

    @abstractmethod
    def close(self) -> None:
        """Release hooks and buffers; the engine cannot be used afterwards."""
