"""Linear models of attributes or classes on features of any number, fitted by L-BFGS over blocks of rows.

Shape letters: n pictures, d features, A attributes or classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.evaluation.probing.rows import Rows, share
from sendvae_fast.evaluation.settings import ProbeConfig
from sendvae_fast.progress import Progress

HELD_NUMBERS = 2**27
"""Features of a rank's rows, at most, that stay in the device's memory while a model is fitted: 512 MiB in float32."""


@dataclass(frozen=True)
class LinearModel:
    """Logits of attributes or classes, linear in standardised features."""

    weight: Tensor
    """[A, d], of standardised features."""
    bias: Tensor
    """[A]."""
    mean: Tensor
    """[d] of the training rows."""
    deviation: Tensor
    """[d] of the training rows; inf for a feature that is constant there, which then counts for nothing."""

    def logits(self, rows: Rows) -> Tensor:
        """[n, A] on the CPU."""
        found = [((block - self.mean) / self.deviation @ self.weight.T + self.bias).cpu() for _, block in rows.blocks()]
        return torch.cat(found)


def fit_linear(
    rows: Rows,
    targets: Tensor,
    num_outputs: int,
    config: ProbeConfig,
    loss: Literal["logistic", "softmax"] = "logistic",
    distributed: Distributed | None = None,
) -> LinearModel:
    """Standardise features by their mean and deviation, and fit linear models of all attributes at once.

    The optimum is that of scikit-learn's `LogisticRegression` on standardised features: for ``logistic`` one of each
    attribute, for ``softmax`` the multinomial one. Attributes share no parameter, so L-BFGS (strong-Wolfe line search)
    on the sum of their objectives takes each to its own optimum, in two matrix products an iteration for all of them.
    With `distributed`, ranks share the rows and add up their gradients.

    Args:
        rows: features [n, d].
        targets: [n, A] of 0 and 1, or with ``softmax`` classes int64 [n].
        num_outputs: A.
        config: penalty and when to stop.
        loss: what kind of targets these are.
        distributed: the ranks; all must call.
    """
    ranks = distributed or Distributed()
    mean, deviation = mean_and_deviation(rows, ranks)
    weight = torch.zeros(num_outputs, rows.dim, dtype=rows.dtype, device=rows.device, requires_grad=True)
    bias = torch.zeros(num_outputs, dtype=rows.dtype, device=rows.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=config.max_iterations,
        tolerance_grad=config.tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    progress = Progress("fitting", config.max_iterations, unit="evaluation")

    start, stop = share(len(rows), ranks)

    def standardised() -> Iterator[tuple[slice, Tensor]]:
        for place, block in rows.blocks(ranks):
            yield place, (block - mean) / deviation

    held = list(standardised()) if (stop - start) * rows.dim <= HELD_NUMBERS else None

    def objective() -> Tensor:
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        total = torch.zeros((), dtype=rows.dtype, device=rows.device)
        for place, block in standardised() if held is None else held:
            logits = block @ weight.T + bias
            target = targets[place].to(rows.device)
            if loss == "logistic":
                part = binary_cross_entropy_with_logits(logits, target.to(logits), reduction="sum") / len(rows)
            else:
                part = cross_entropy(logits, target, reduction="sum") / len(rows)
            part.backward()
            total += part.detach()
        for part in (total, weight.grad, bias.grad):
            ranks.all_reduce_sum(part)
        penalty = 1 / (config.inverse_penalty * len(rows))
        weight.grad += penalty * weight.detach()
        total += penalty / 2 * weight.detach().square().sum()
        progress.advance(1, objective=float(total))
        return total

    with progress, torch.enable_grad():
        solver.step(objective)
        progress.total = progress.done
    return LinearModel(weight.detach(), bias.detach(), mean, deviation)


def mean_and_deviation(rows: Rows, distributed: Distributed) -> tuple[Tensor, Tensor]:
    """Of every feature [d], in two passes with sums in float64. The deviation of a constant feature is inf."""
    mean = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    for _, block in rows.blocks(distributed):
        mean += block.double().sum(dim=0)
    mean = distributed.all_reduce_sum(mean) / len(rows)
    variance = torch.zeros_like(mean)
    for _, block in rows.blocks(distributed):
        variance += (block.double() - mean).square().sum(dim=0)
    deviation = (distributed.all_reduce_sum(variance) / len(rows)).sqrt()
    is_constant = deviation <= 1e-12 * mean.abs()  # the rounding of its mean
    return mean.to(rows.dtype), torch.where(is_constant, torch.inf, deviation).to(rows.dtype)
