"""AdamW and an exponential moving average of the parameters, as one optimizer.

The average is optimizer state, so that ZeRO shards it with the moments and one pass over memory can update all of it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sendvae_fast.engine.settings import OptimizerConfig
from sendvae_fast.ops import adamw_ema_, global_norm


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) with an EMA of the parameters: `ops.adamw_ema_`, which has the formula.

    State per parameter: `step` (int64 scalar on the parameter's device), `exp_avg`, `exp_avg_sq` and, with `ema_decay`,
    `ema`, which starts as a copy of the parameter. All but the step are of the parameter's dtype and shape. Parameters
    without a gradient are left alone.

    With `max_grad_norm` the optimizer also measures the global norm of the gradients, leaves it in `grad_norm` (a
    scalar tensor on the device), clips by it (0: does not clip), and changes nothing when it is not finite. The
    gradients must then be whole; with ZeRO's partitions DeepSpeed does all that instead.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        )
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None

    @classmethod
    def from_config(
        cls, params: Iterable[Tensor], config: OptimizerConfig, *, whole_gradients: bool = True
    ) -> "AdamWEMA":
        """The optimizer of a config; without whole gradients it neither measures nor clips them."""
        return cls(
            params,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            ema_decay=config.ema_decay,
            max_grad_norm=config.max_grad_norm if whole_gradients else None,
        )

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the state tensors that have the shape of their parameter."""
        has_ema = any(group["ema_decay"] for group in self.param_groups)
        return ("exp_avg", "exp_avg_sq", "ema") if has_ema else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def init_state(self, params: Iterable[Tensor]) -> None:
        """Make the state of `params` as it is before the first step, so that it can be read or loaded at once."""
        for param in params:
            state = self.state[param]
            state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
            for key in self.state_keys:
                state[key] = param.detach().clone() if key == "ema" else torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, once. The host does not wait for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.max_grad_norm is not None:
            self.grad_norm = global_norm(
                [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
            )
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            self.init_state([param for param in params if not self.state[param]])
            self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict) -> None:
        states = [self.state[param] for param in params]
        adamw_ema_(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["ema"] for state in states] if group["ema_decay"] else None,
            [state["step"] for state in states],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_decay=group["ema_decay"],
            grad_norm=self.grad_norm,
            max_grad_norm=self.max_grad_norm or 0.0,
        )
