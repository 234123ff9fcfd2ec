"""AdamW and an exponential moving average of the parameters, as one optimizer.

The average is optimizer state, so that ZeRO shards it with the moments and one pass over memory can update all of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sendvae_fast.errors import UserError


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, gradient clipping and EMA."""

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
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}: it must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}: they must be two numbers in [0, 1)")
        if not self.eps > 0:
            raise UserError(f"eps is {self.eps}: it must be above 0")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay is {self.weight_decay}: it must not be below 0")
        if not self.max_grad_norm >= 0:
            raise UserError(f"max_grad_norm is {self.max_grad_norm}: it must not be below 0 (0 turns clipping off)")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}: it must be between 0 and 1, or null for no average")


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) with an EMA of the parameters, on `torch._foreach_*` operations.

    With gradient g at step k (from 1), the order of operations of `torch.optim.AdamW`, then the average:

        p  <- p (1 - lr weight_decay)
        m  <- m + (1 - beta1)(g - m);   v <- beta2 v + (1 - beta2) g^2
        p  <- p - lr / (1 - beta1^k)  m / (sqrt(v / (1 - beta2^k)) + eps)
        ema <- ema + (1 - ema_decay)(p - ema)

    State per parameter: `step` (int), `exp_avg`, `exp_avg_sq` and, with `ema_decay`, `ema`, which starts as a copy of
    the parameter. All are of the parameter's dtype and shape. Parameters without a gradient are left alone.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        )

    @classmethod
    def from_config(cls, params: Iterable[Tensor], config: OptimizerConfig) -> "AdamWEMA":
        return cls(
            params,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            ema_decay=config.ema_decay,
        )

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the state tensors."""
        has_ema = any(group["ema_decay"] for group in self.param_groups)
        return ("exp_avg", "exp_avg_sq", "ema") if has_ema else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def init_state(self, params: Iterable[Tensor]) -> None:
        """Make the state of `params` as it is before the first step, so that it can be read or loaded at once."""
        for param in params:
            state = self.state[param]
            state["step"] = 0
            for key in self.state_keys:
                state[key] = param.detach().clone() if key == "ema" else torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self.init_state([param for param in params if not self.state[param]])
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict) -> None:
        states = [self.state[param] for param in params]
        grads = [param.grad for param in params]
        exp_avg = [state["exp_avg"] for state in states]
        exp_avg_sq = [state["exp_avg_sq"] for state in states]
        (beta1, beta2), lr = group["betas"], group["lr"]
        for state in states:
            state["step"] += 1

        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)

        denominator = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominator, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, exp_avg, denominator, [-lr / (1 - beta1 ** state["step"]) for state in states])
        if group["ema_decay"]:
            torch._foreach_lerp_([state["ema"] for state in states], params, 1 - group["ema_decay"])
