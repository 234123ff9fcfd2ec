"""What a trainer sees of an engine, whichever engine it is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sendvae_fast.engine import state
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.optimizer import AdamWEMA, OptimizerConfig
from sendvae_fast.engine.running_statistics import RunningStatistics
from sendvae_fast.engine.speed import compile_blocks, recompute_blocks
from sendvae_fast.errors import UserError


@dataclass(kw_only=True)
class EngineConfig:
    """How a module is trained over ranks."""

    name: Literal["deepspeed", "ddp"] = "deepspeed"
    """deepspeed: ZeRO. ddp: PyTorch's DistributedDataParallel with a plain optimizer."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed splits over ranks: 0 nothing, 1 optimizer state and EMA, 2 gradients too, 3 parameters too."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward and backward under autocast; parameters, gradients and optimizer state stay fp32. Frozen
    networks (foundation model, LPIPS) hold their weights in bf16."""

    accumulation_steps: int = 1
    """Backward passes per optimizer step; their gradients are averaged, and reduced over ranks after the last one."""

    compile: bool = False
    """Compile the repeated blocks of every network (torch.compile). Starts a minute or so later. Off, because what it
    gains differs from machine to machine: `python -m bench step` measures it. Not with zero_stage 3."""

    recompute: bool = False
    """Activation checkpointing: keep the inputs of each block alone and compute it again in the backward pass. A third
    more arithmetic for a fraction of the memory, the same gradients. Not with zero_stage 3."""

    def __post_init__(self) -> None:
        if self.name not in ("deepspeed", "ddp"):
            raise UserError(f"engine name is {self.name!r}: it must be deepspeed or ddp")
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"zero_stage is {self.zero_stage}: it must be 0, 1, 2 or 3")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"precision is {self.precision!r}: it must be fp32 or bf16")
        if self.accumulation_steps < 1:
            raise UserError(f"accumulation_steps is {self.accumulation_steps}: it must be at least 1")
        for name in ("compile", "recompute"):
            if getattr(self, name) and not self.has_whole_parameters:
                raise UserError(f"engine.{name} does not work where parameters are split: take zero_stage 2 or less")

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def has_whole_parameters(self) -> bool:
        """Whether every rank holds all weights at all times."""
        return self.name == "ddp" or self.zero_stage < 3

    @property
    def has_whole_gradients(self) -> bool:
        """Whether the optimizer is given whole gradients, and not partitions that DeepSpeed has clipped."""
        return self.name == "ddp" or self.zero_stage == 0


class StepResult(NamedTuple):
    """What one optimizer step did; the same on every rank."""

    grad_norm: float
    """Global L2 norm of the averaged gradients before clipping; not finite when the step was skipped."""

    skipped: bool
    """True when a gradient was not finite on any rank: parameters, state and EMA are as before on all ranks."""


class Engine(ABC):
    """A module in training: forward, backward, step, and its state as full tensors by parameter name.

    The loss given to `backward` is a mean over the local batch; gradients are averaged over ranks, so ranks with equal
    batches together equal one rank with the whole batch. Several engines may live in one process.

    Parameters stay fp32. Which parameters are trained is read from `requires_grad` when the engine is built.
    """

    module: nn.Module

    def __init__(
        self, module: nn.Module, optimizer_config: OptimizerConfig, config: EngineConfig, distributed: Distributed
    ) -> None:
        self.module = module.to(distributed.device)
        if config.compile:
            compile_blocks(self.module)
        if config.recompute:
            recompute_blocks(self.module)
        self.config, self.distributed, self.optimizer_config = config, distributed, optimizer_config
        self.trained = {name: param for name, param in self.module.named_parameters() if param.requires_grad}
        if not self.trained:
            raise ValueError("the module has no parameter to train: every requires_grad is False")
        self.optimizer = AdamWEMA.from_config(
            self.trained.values(), optimizer_config, whole_gradients=config.has_whole_gradients
        )
        for buffer in self.module.buffers():
            distributed.broadcast(buffer)
        self.num_skipped = 0
        self._running_statistics = RunningStatistics(self.module, distributed)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, at the engine's precision."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a scalar, mean over the local batch). `accumulation_steps` calls per step."""

    @abstractmethod
    def _apply_gradients(self) -> float:
        """Clip and update unless the averaged gradients are not finite, drop them, return their norm."""

    @abstractmethod
    def gather(self, name: str, kind: str) -> Tensor:
        """The full tensor behind one parameter name, on the device; kind "model" or one of `state_keys`. Collective.

        The result may share memory with the parameter. State exists for trained parameters only.
        """

    @abstractmethod
    def scatter(self, name: str, kind: str, value: Tensor) -> None:
        """Store a full tensor behind one parameter name: the inverse of `gather`, with the value on every rank."""

    @abstractmethod
    def optimizer_params(self) -> list[Tensor]:
        """The tensors the optimizer updates: the parameters, or this rank's flat partitions of them."""

    def step(self) -> StepResult:
        """Update the parameters with the averaged, clipped gradients, then drop the gradients.

        Non-finite gradients on any rank skip the update on all ranks: nothing is raised, `skipped` says so and
        `num_skipped` counts. Batch-norm running statistics go back to what they were after the last good step.
        The host waits for the norm once, as DeepSpeed does in any case; the update is under way by then, unless it is
        DeepSpeed's at ZeRO 1 to 3.
        """
        grad_norm = self._apply_gradients()
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self.num_skipped += 1
            self._running_statistics.restore()
        else:
            self._running_statistics.commit()
        return StepResult(grad_norm, skipped)

    def autocast(self) -> torch.autocast:
        """The context that gives the engine's precision to what is computed outside its own call."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.distributed.device.type, torch.bfloat16, enabled=enabled)

    def input_gradient(self, x: Tensor, loss: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
        """The module's output for `x`, and the gradient of `loss` of that output with respect to `x`.

        For a GAN: what the generator learns from, and the output, whose graph goes into this engine's own `backward`
        afterwards, so that one forward serves both. No parameter gets a gradient here, and `x` is cut off its graph.

            logits, gradient = critic.input_gradient(fake, generator_loss)
            critic.backward(critic_loss(logits, critic(real)))

        `backward` still needs a call of the engine itself in its loss, here the one for real pictures. Not for ZeRO 3,
        whose hooks gather a module's weights for one traversal of its graph only.

        Raises:
            ValueError: the engine is at ZeRO stage 3.
        """
        if not self.config.has_whole_parameters:
            raise ValueError("input_gradient goes through a graph twice, which ZeRO stage 3 does not allow")
        leaf = x.detach().requires_grad_()
        with self.autocast():
            output = self.module(leaf)
        (gradient,) = torch.autograd.grad(loss(output), leaf, retain_graph=True)
        return output, gradient

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Optimizer state tensors there are: exp_avg, exp_avg_sq and, with ema_decay, ema."""
        return self.optimizer.state_keys

    @property
    def num_updates(self) -> int:
        """Optimizer steps applied so far (skipped ones not counted)."""
        return int(self.optimizer.state[self.optimizer_params()[0]]["step"])

    def full_state(self, kind: str) -> dict[str, Tensor]:
        """All tensors of one kind by name, on the CPU of every rank. Collective.

        "model": the module's state dict (parameters fp32, buffers in their dtype). "ema": the same keys with the
        moving average in place of every trained parameter. "exp_avg", "exp_avg_sq": trained parameters only.
        """
        return state.full_state(self, kind)

    def load_model(self, tensors: dict[str, Tensor]) -> None:
        """Load a full state dict, the same on every rank, into the module; the EMA, if any, restarts from it.

        Raises:
            UserError: names or shapes differ from the module's.
        """
        state.load_model(self, tensors)
        self._running_statistics.commit()

    def save(self, directory: Path) -> None:
        """Write moments, EMA and step counts into `directory`, every rank its share. Collective; see `engine.state`.

        Weights are not in it: they are `full_state("model")`, which the caller writes in the stock layout.
        """
        state.save_optimizer(self, directory)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, by any number of ranks, any ZeRO stage, either engine. Call `load_model` first.

        Raises:
            UserError: the directory is not such a save, or belongs to another module.
        """
        state.load_optimizer(self, directory)

    @abstractmethod
    def close(self) -> None:
        """Let go of hooks and buffers; the engine cannot be used afterwards."""


def build_engine(module: nn.Module, optimizer_config: OptimizerConfig, config: EngineConfig) -> Engine:
    """Move `module` to this rank's device, copy rank 0's weights to all ranks, and make it trainable.

    Joins the process group if need be. DeepSpeed is imported here, on first use (it takes seconds).
    """
    distributed = init_distributed()
    if config.name == "ddp":
        from sendvae_fast.engine.ddp_engine import DDPEngine

        return DDPEngine(module, optimizer_config, config, distributed)
    from sendvae_fast.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(module, optimizer_config, config, distributed)
