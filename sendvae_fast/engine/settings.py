"""The settings of engines, optimizers and loggers.

Like every module of settings it imports no torch, so that help, and what is wrong with an option, come at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.errors import UserError

LOGGERS = ("tensorboard", "wandb", "trackio")


@dataclass(kw_only=True)
class EngineConfig:
    """How a module is trained over ranks. Raises `UserError` for a value out of range, or that another one excludes."""

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
    """Compile the repeated blocks of every network (torch.compile). Starts a minute or so later. Off, because its gain
    differs from machine to machine: `python -m bench step` measures it. Not with zero_stage 3."""

    recompute: bool = False
    """Activation checkpointing: keep the inputs of each block alone and compute it again in the backward pass. A third
    more arithmetic for a fraction of the memory, the same gradients. Not with zero_stage 3."""

    cuda_graph: bool = False
    """Record the whole step as a CUDA graph after its first steps and replay it: one launch in place of thousands, for
    steps that the host cannot queue as fast as the GPU does them. Needs a GPU and name ddp."""

    def __post_init__(self) -> None:
        checks.choices(self, where="engine")
        checks.at_least(1, self, "accumulation_steps", where="engine")
        for name in ("compile", "recompute"):
            if getattr(self, name) and not self.has_whole_parameters:
                raise UserError(f"engine.{name} does not work where parameters are split: take zero_stage 2 or less")
        if self.cuda_graph and self.name != "ddp":
            raise UserError(
                "engine.cuda_graph does not work with DeepSpeed, whose hooks run on the host: set engine.name=ddp, or "
                "leave it out"
            )

    @property
    def has_whole_parameters(self) -> bool:
        """Whether every rank holds all weights at all times."""
        return self.name == "ddp" or self.zero_stage < 3

    def with_whole_parameters(self) -> EngineConfig:
        """These settings, changed where needed for a network that needs whole weights."""
        return self if self.has_whole_parameters else dataclasses.replace(self, zero_stage=2)

    @property
    def has_whole_gradients(self) -> bool:
        """Whether the optimizer is given whole gradients, and not partitions that DeepSpeed has clipped."""
        return self.name == "ddp" or self.zero_stage == 0


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, gradient clipping and EMA. Raises `UserError` for a value out of range."""

    learning_rate: float = 1e-4
    """Constant learning rate (the field's recipes for these models have no schedule)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.0
    """Decoupled weight decay per unit of learning rate."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 leaves them as they are."""

    ema_decay: float | None = None
    """Decay of the moving average of the parameters per step, such as 0.9999; null keeps no average."""

    def __post_init__(self) -> None:
        checks.above(0, self, "learning_rate", "eps")
        checks.at_least(0, self, "weight_decay")
        checks.at_least(0, self, "max_grad_norm", hint=" (0 turns clipping off)")
        checks.in_interval("(0, 1)", self, "ema_decay", hint=", or null for no average")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}: they must be two numbers in [0, 1)")


@dataclass(kw_only=True)
class LoggingConfig:
    """Where a run is shown while it trains. Raises `UserError` for a logger that does not exist."""

    to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Any of tensorboard, wandb and trackio; [] for metrics.jsonl alone. They come with the extra `logging`."""
    project: str = "sendvae"
    """The project of wandb and trackio; the run is called as its folder."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: into the run folder, without an account or a network; `wandb sync` sends it later."""

    def __post_init__(self) -> None:
        checks.choices(self, where="logging")
        for name in self.to:
            if name not in LOGGERS:
                raise UserError(f"logging.to names {name!r}: there are {', '.join(LOGGERS)}")
